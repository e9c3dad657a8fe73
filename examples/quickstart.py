"""Text in, text out, and the same text as ordinary decoding gives.

python examples/quickstart.py        (fetches the default model, 98 MB, the first time)
"""

from idlm_kernels import LLM, DecodeOptions, SamplingParams

llm = LLM("default", seed=1)
params = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=32)

prompts = ["The sky is blue because", "The capital of France is"]
for result in llm.generate(prompts, params):
    print(f"{result.prompt!r} -> {result.text!r}")

(answer,) = llm.chat([{"role": "user", "content": "List five fruits."}], SamplingParams(max_tokens=40))
print(f"{answer.text}\n{answer.tokens} tokens in {answer.forwards} forwards")

# The same prompt, seed and temperature, one token per forward: token for token the same.
seeded = SamplingParams(temperature=0.7, max_tokens=32, seed=7)
(strided,) = llm.generate(prompts[0], seeded, options=DecodeOptions("quadratic", 4))
(ordinary,) = llm.generate(prompts[0], seeded, options=DecodeOptions("ar"))
assert strided.token_ids == ordinary.token_ids
print(f"equal to ordinary decoding, with {strided.forwards} instead of {ordinary.forwards} forwards")
