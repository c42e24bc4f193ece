"""One forward pass, five ways: padded, packed, written out, token by token, output layer in slices."""
