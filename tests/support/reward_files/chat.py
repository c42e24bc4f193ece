"""A file of reward functions as TRL takes them, for rows with chat messages and nested columns."""

# mypy: ignore-errors


def polite(prompts, completions, **kwargs):
    assert all(prompt[0]["role"] == "system" for prompt in prompts)
    return [float("please" in messages[0]["content"].lower()) for messages in completions]


def matches(completions, meta, solution, **kwargs):
    values = []
    for messages, about, wanted in zip(completions, meta, solution, strict=True):
        assert messages[-1]["role"] == "assistant"
        text = messages[-1]["content"]
        values.append(None if about is None else about["worth"] * (wanted in text))
    return values


async def asked(prompts, completions, **kwargs):
    return [
        float(prompt[-1]["content"].split()[0] in made[0]["content"])
        for prompt, made in zip(prompts, completions, strict=True)
    ]
