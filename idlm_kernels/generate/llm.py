"""`LLM`: text in, text out, with the names that programs written for vLLM use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from idlm_kernels.generate.generator import Generator
from idlm_kernels.generate.options import DecodeOptions
from idlm_kernels.generate.output import GenerationResult
from idlm_kernels.generate.params import SamplingParams, checked_seed, mixed_seed
from idlm_kernels.model.mask_input import MaskInputKind
from idlm_kernels.model.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any] | Sequence[int]

# What other engines take and this one has in one form only: the value that asks for it.
_ONLY: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "quantization": None,
    "tokenizer": None,
    "enable_lora": False,
    "cpu_offload_gb": 0,
    "kv_cache_dtype": "auto",
    "speculative_config": None,
}
# Settings of other engines that could not change what comes out here.
_WITHOUT_EFFECT = {
    "disable_log_stats",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "swap_space",
    "trust_remote_code",
}
_DTYPES = {"half": "fp16", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "float32": "fp32"}


class LLM:
    """A model that answers prompts: text, token ids, or the messages of a chat.

    Args:
        model: a Hugging Face folder or hub id, a GGUF file, or "default" (SmolLM2-135M-Instruct, fetched once).
        adapter: folder of the LoRA adapter for MASK rows. "default" is the one of the default model, or the one in
            the folder "adapter" inside the model's own; None is none.
        mask_input, mask_token_id: what MASK rows embed ("vector", "token", "mean", "uniform"), where the adapter does
            not say it, and the MASK id for it, where the model does not.
        revision: of a hub id.
        dtype: of the weights: auto, float32, float16, bfloat16, or a torch.dtype.
        activations: "int8" computes a quantised model on a CPU with activations of 8 bits instead of 16: faster, and
            about as coarse as other programs are by default. Strided decoding still equals ordinary decoding.
        device: cpu or cuda; "auto" is CUDA where there is a device.
        seed: makes requests without a seed of their own reproducible: the k-th request of this LLM always draws the
            same noise. None draws a seed for each.
        max_model_len: the most tokens of a request, prompt included; the model's own limit when None. No memory is
            taken for it before a request needs it.
        max_num_seqs: the most prompts that are decoded together; further ones take over from those that end.
        max_num_batched_tokens: the most prompt tokens of one forward.
        gpu_memory_utilization: the most of the memory that is free, on a CPU too, that the KV cache may take.
        tensor_parallel_size: 1.
        options: how tokens are drafted and verified. With the default, `match`, they are those of ordinary decoding.
        backend: forces one backend for every op, process-wide.
        others: further settings of vLLM. Those that could not change the result are taken and have no effect (also
            trust_remote_code: no remote code is ever run); others are taken at the value that this library has.

    Raises: TypeError, ValueError naming the argument; CheckpointError, FileNotFoundError naming the file.
    """

    def __init__(
        self,
        model: str | Path = "default",
        *,
        adapter: str | Path | None = "default",
        mask_input: MaskInputKind | None = None,
        mask_token_id: int | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        activations: str = "auto",
        device: str | torch.device = "auto",
        seed: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        gpu_memory_utilization: float = 0.5,
        tensor_parallel_size: int = 1,
        options: DecodeOptions | None = None,
        backend: str | None = None,
        **others: Any,
    ):
        _refuse_unsupported({"tensor_parallel_size": tensor_parallel_size, **others}, model)
        self._seed = None if seed is None else checked_seed(seed)
        self._requests = 0  # so far
        self.options = options or DecodeOptions()
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.generator = Generator.from_pretrained(
            model,
            adapter=adapter,
            mask_input=mask_input,
            mask_token_id=mask_token_id,
            revision=revision,
            device=device,
            dtype=_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype,
            activations=activations,
            backend=backend,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
        )

    def get_tokenizer(self) -> Tokenizer:
        tokenizer = self.generator.tokenizer
        assert tokenizer is not None  # from_pretrained brings one
        return tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        options: DecodeOptions | None = None,
    ) -> list[GenerationResult]:
        """Continue each prompt; results in the order of the prompts, `.text` or `.outputs[0].text` of each.

        prompts: one or a list of: text; token ids, as a list or as {"prompt_token_ids": [...]}; {"prompt": text}.
        sampling_params: for all, or one for each; greedy and at most 256 tokens when None. use_tqdm: show a bar of
        progress on stderr. options: other than those of this LLM.

        Raises: TypeError, ValueError naming the prompt or the argument that cannot run; nothing is decoded then.
        """
        listed = _listed(prompts)
        texts = [_text_of(prompt) for prompt in listed]
        ids = [self._ids(i, prompt) for i, prompt in enumerate(listed)]
        params = self._seeded(sampling_params, len(ids))
        logprobs = any(p.logprobs is not None for p in ([params] if isinstance(params, SamplingParams) else params))
        options = options or self.options
        if logprobs:
            options = options.changed(logprobs=True)
        with _bar(len(ids), use_tqdm) as progress:
            results = self.generator.generate(ids, params, options, progress=progress)
        self._requests += len(ids)
        return [dataclasses.replace(result, prompt=text) for result, text in zip(results, texts, strict=True)]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        options: DecodeOptions | None = None,
    ) -> list[GenerationResult]:
        """Answer one conversation, or each of several: lists of {"role": ..., "content": ...}.

        chat_template_kwargs: further names that the model's chat template may read. The rest is as in `generate`.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        tokenizer, prompts = self.get_tokenizer(), []
        for i, conversation in enumerate(conversations):
            try:
                text = tokenizer.apply_chat_template(
                    list(conversation),  # type: ignore[arg-type]
                    add_generation_prompt=add_generation_prompt,
                    **(chat_template_kwargs or {}),
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"conversation {i}: {error}") from None
            ids = tokenizer.encode(text, add_special_tokens=False)  # a template writes its special tokens itself
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return self.generate(prompts, sampling_params, use_tqdm, options=options)

    def _ids(self, index: int, prompt: Prompt) -> list[int]:
        if isinstance(prompt, Mapping):
            if unknown := sorted(set(prompt) - {"prompt", "prompt_token_ids"}):
                raise ValueError(
                    f"prompt {index} holds {', '.join(unknown)}, wanted 'prompt' (text) or 'prompt_token_ids'"
                )
            prompt = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt.get("prompt", "")
        if not isinstance(prompt, str):
            return list(prompt)  # type: ignore[arg-type]
        if not prompt:
            raise ValueError(f"prompt {index} is empty, wanted text")
        try:
            return self.get_tokenizer().encode(prompt)
        except (TypeError, ValueError) as error:
            raise type(error)(f"prompt {index}: {error}") from None

    def _seeded(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> SamplingParams | Sequence[SamplingParams]:
        """The parameters with a seed where only this LLM has one."""
        one = params or SamplingParams()
        if self._seed is None or (isinstance(one, SamplingParams) and one.seed is not None):
            return one
        each = [one] * count if isinstance(one, SamplingParams) else one
        seeds = (mixed_seed(self._seed, self._requests + i) for i in range(len(each)))
        return [p if p.seed is not None else dataclasses.replace(p, seed=s) for p, s in zip(each, seeds, strict=False)]


def _refuse_unsupported(settings: Mapping[str, Any], model: str | Path) -> None:
    for name, value in settings.items():
        if name not in _ONLY and name not in _WITHOUT_EFFECT:
            raise TypeError(f"LLM has no argument {name!r}")
        if name in _WITHOUT_EFFECT or value == _ONLY[name] or (name == "tokenizer" and value == model):
            continue
        if name == "speculative_config":
            raise ValueError("speculative_config is not used here: see options=DecodeOptions(plan=..., stride=...)")
        raise ValueError(f"{name} is {value!r}, wanted {_ONLY[name]!r}: this library has no other")


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Several prompts as they are, and one as a list of one."""
    if isinstance(prompts, (str, Mapping)) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _text_of(prompt: Prompt) -> str | None:
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return text if isinstance(text, str) else None


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr, and what moves it to a number of prompts."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=total)
        yield lambda done: bar.update(task, completed=done)
