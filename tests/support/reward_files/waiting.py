"""A file of async reward functions as TRL takes them: a function, a partial, an object with an async __call__."""

# mypy: ignore-errors

import asyncio
import functools


async def _near(completions, answer, scale, **kwargs):
    async def one(text, wanted):
        await asyncio.sleep(0.01)
        return 1.0 / (1.0 + abs(len(text) - len(str(wanted))) / scale)

    return await asyncio.gather(*map(one, completions, answer))


near = functools.partial(_near, scale=2.0)


class Even:
    async def __call__(self, prompts, completions, **kwargs):
        await asyncio.sleep(0.01)
        return [None if not text else float(len(text) % 2 == 0) for text in completions]


even = Even()


async def same(completions, **kwargs):
    """Looks at the whole batch: all completions of a prompt are in it."""
    return [completions.count(text) / len(completions) for text in completions]
