"""Long completions of packed prompts, each attended to by itself.

What a packed completion may look at is no plain causal triangle: all of its prompt, and its own tokens up to each. A
mask that says so has a number for each pair of tokens, for 16 thousand of them a GiB, and kernels take twice as long
with one. So a long completion attends as the row that it is without packing, prompt first, causally. Its prompt's
queries are computed again and dropped, which is cheap where the completion is longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_mlflow.forward import tuning
from grpo_mlflow.forward.attention import Packed
from grpo_mlflow.forward.prefix_tree import Ids, Tree, attention, in_a_row


def pays(prompts: Sequence[Ids], completions: Sequence[Ids]) -> bool:
    """Return whether the longest completion is long, also beside the longest prompt."""
    before, own = (max(map(len, each), default=0) for each in (prompts, completions))
    return own >= tuning.ALONE_FROM_TOKENS and before <= tuning.ALONE_LONGEST_PROMPT * own


class Continued(Packed):
    """The tokens of a tree of prompts, then those of completions; `owners` names each completion's prompt.

    ids, positions, starts, lengths, longest    as those of `Tree`, whose last level the completions would be
    """

    def __init__(self, prompts: Tree, completions: Sequence[Ids], owners: Sequence[int], device: torch.device) -> None:
        self._prompts = prompts
        lengths = torch.tensor([len(completion) for completion in completions])
        starts = lengths.cumsum(0) - lengths + len(prompts.ids)
        self.starts, self.lengths = (*prompts.starts, starts), (*prompts.lengths, lengths)
        self.ids = torch.cat([prompts.ids, in_a_row(completions, device)])
        above = prompts.spans()
        before = [sum(part.stop - part.start for part in above[owner]) for owner in owners]
        places = [torch.arange(first, first + own) for first, own in zip(before, lengths.tolist(), strict=True)]
        self.positions = torch.cat([prompts.positions, torch.cat(places).to(device)])
        self.longest = int(self.positions.max()) + 1
        self._rows = [
            ([*above[owner], slice(start, start + own)], first)
            for owner, start, own, first in zip(owners, starts.tolist(), lengths.tolist(), before, strict=True)
            if own
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """See `Packed.attend`; tokens are those of `ids`."""
        given, first = (query, key, value), len(self._prompts.ids)
        found = [self._prompts.attend(layer, query[:first], key[:first], value[:first], scaling)]
        for parts, before in self._rows:
            q, k, v = (torch.cat([rows[part] for part in parts]).transpose(0, 1)[None] for rows in given)
            found.append(attention(q, k, v, None, scaling)[0].transpose(0, 1)[before:])
        return torch.cat(found)
