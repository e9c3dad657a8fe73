"""The loop of a server: requests that come while others are decoded, text as it is made, one that is cancelled.

python examples/engine.py        (fetches the default model, 98 MB, the first time)
"""

from idlm_kernels import LLM, SamplingParams
from idlm_kernels.generate import Engine, EngineOptions

generator = LLM("default").generator
tokenizer = generator.tokenizer
engine = Engine(
    generator.model,
    tokenizer,
    options=EngineOptions(plan="quadratic", stride=3, max_num_seqs=2, max_model_len=128, window_steps=4),
)


def submit(text: str, max_tokens: int, seed: int) -> None:
    request = engine.submit(tokenizer.encode(text), SamplingParams(max_tokens=max_tokens), seed)
    request.tag = text


arriving = ["The capital of France is", "Once upon a time", "1, 2, 3,"]
submit("The sky is blue because", max_tokens=100, seed=1)
while engine.busy:
    # Between two windows the host takes requests in and cancels others. `window` runs some steps of the batch.
    if arriving:
        submit(arriving.pop(0), max_tokens=12, seed=2)
    for request, event in engine.window():
        print(f"{request.tag:<26} {event.text!r}")
        if request.ended:
            print(f"{request.tag:<26} ended: {request.output.finish_reason}")
        elif len(request.output.token_ids) > 40:
            engine.cancel(request)
            print(f"{request.tag:<26} cancelled after {len(request.output.token_ids)} tokens")
