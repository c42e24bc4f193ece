"""TRL's side of `benchmarks.compare_trl`: its GRPOTrainer, one optimizer step per turn; runs in `.venv-bench`."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from benchmarks import workloads
from benchmarks.workloads import KL_COEF, LR, Workload


def side(workload: Workload, folder: str, threads: int, iterations: int, dtype: str) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    torch.set_num_threads(threads)
    turns = workloads.turns()

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.turn = next(turns)

        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            self.turn.done()
            following = next(turns, None)
            if following is None:
                control.should_training_stop = True
            else:
                self.turn = following

    def reward(completions: list[str], number: list[int], **_: Any) -> list[float]:
        return [workload.reward(n, text) for n, text in zip(number, completions, strict=True)]

    rows = [{"prompt": workload.prompt(n), "number": n} for n in range(workload.prompts * iterations)]
    trainer = GRPOTrainer(
        model=folder,
        reward_funcs=reward,
        args=_config(workload, iterations, dtype),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        callbacks=[Turns()],
    )
    trainer.train()
    lengths = [entry["completions/mean_length"] for entry in trainer.state.log_history if "reward" in entry]
    workloads.leave(mean_length=sum(lengths) / len(lengths))


def _config(workload: Workload, iterations: int, dtype: str) -> Any:
    """Return the settings that make an iteration of TRL's the same work as ours."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=dtype == "bfloat16",
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=workload.prompts * workload.k,
        num_generations=workload.k,
        max_completion_length=workload.tokens,
        generation_kwargs={"min_new_tokens": workload.tokens} if workload.fixed else None,
        beta=KL_COEF,
        loss_type="grpo",
        temperature=1.0,
        max_steps=iterations,
        learning_rate=LR,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


if __name__ == "__main__":
    workloads.main(side)
