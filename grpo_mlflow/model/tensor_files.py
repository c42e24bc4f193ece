"""A safetensors file written tensor by tensor, so that no more than one of them need be in memory.

The library takes all tensors at once. The format is its own: the length of a header in 8 bytes, the header, a JSON
object with type, shape and place of each tensor, and the tensors one after the other
(https://github.com/huggingface/safetensors#format). Its order is the library's, so that the files are the same.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_TYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(path: Path, like: Mapping[str, Tensor], value: Callable[[str], Tensor], *, of_torch: bool = True) -> None:
    """Write tensors by name to a new file.

    Args:
        like: a tensor of the type and shape of each; its numbers are not looked at.
        value: returns one of them, called in the order of the file.
        of_torch: whether to say so in the file, as transformers wants it of a model.
    """
    names = sorted(like, key=lambda name: (-like[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}} if of_torch else {}
    end = 0
    for name in names:
        begin, end = end, end + like[name].numel() * like[name].dtype.itemsize
        header[name] = {
            "dtype": _TYPES[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [begin, end],
        }
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    with path.open("xb") as stream:
        stream.write(struct.pack("<Q", len(content)) + content)
        for name in names:
            tensor = value(name).detach()
            assert (tensor.shape, tensor.dtype) == (like[name].shape, like[name].dtype), name
            stream.write(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
