"""The model `idlm` of lm-evaluation-harness: a decode by strides, and log-probabilities from clean rows.

This module is an entry point (group lm_eval.models) and needs the extra `eval`; docs/evaluation.md says how to use it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, maybe_truncate, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from idlm_kernels.generate import LLM, DecodeOptions, Generator, SamplingParams
from idlm_kernels.generate.params import mixed_seed
from idlm_kernels.model.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_OF_THE_HARNESS = {"do_sample", "until", "max_gen_toks"}
_AT_ONCE = 16  # times max_num_seqs: requests between two looks at the cache of answers


@register_model("idlm")
class IntrospectiveLM(TemplateLM):
    """A model for `lm_eval --model idlm --model_args pretrained=...,plan=...`.

    Args:
        pretrained: a Hugging Face folder or hub id, a GGUF file, or "default".
        adapter: folder of the LoRA adapter for MASK rows; "default" is the one of the default model, "none" is none.
        device: cuda, cuda:N or cpu; where there is no GPU it is the CPU, whatever is asked for.
        revision, dtype, backend, gpu_memory_utilization, max_num_seqs, max_num_batched_tokens: as in `LLM`.
        max_length: the most tokens of a request, prompt included; the model's own limit when None.
        plan, stride, rule: as in DecodeOptions. With the rule `match` they change no answer.
        max_gen_toks: of tasks that do not say how many tokens an answer may have.
        seed: of tasks that sample. An answer depends on it and on its prompt, not on the other requests of a run; the
            k-th answer to the same prompt draws noise of its own.
        enable_thinking: handed to the chat template, where it is not None.
        think_end_token: what ends the reasoning, such as "</think>": only what comes after it is the answer, and stops
            of a task apply to that.
        add_bos_token: whether texts begin with the tokenizer's BOS; as the tokenizer has it when None.
        prefix_token_id: what stands before a text that is scored without a context; BOS, else the end of text.
        batch_size: max_num_seqs under the harness's name. Its default, 1, and "auto" leave max_num_seqs as it is.
        generator: instead of what is loaded from `pretrained`, for Python.

    Raises: TypeError, ValueError naming the argument; CheckpointError, FileNotFoundError naming the file.
    """

    tokenizer: Tokenizer

    def __init__(
        self,
        pretrained: str = "default",
        *,
        adapter: str | None = "default",
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        backend: str | None = None,
        plan: str = "auto",
        stride: int | str = "auto",
        rule: str = "match",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        gpu_memory_utilization: float = 0.5,
        seed: int = 1234,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        generator: Generator | None = None,
    ):
        super().__init__()
        self.options = DecodeOptions(plan=plan, stride=stride, rule=rule)  # type: ignore[arg-type]
        if batch_size is not None and str(batch_size).isdigit() and int(batch_size) > 1:
            max_num_seqs = int(batch_size)
        if device is None or not torch.cuda.is_available():
            device = "auto"  # where nobody chose the harness says "cuda:0"
        if generator is None:
            llm = LLM(
                pretrained,
                adapter=None if adapter == "none" else adapter,
                revision=revision,
                device=device,
                dtype=dtype,
                backend=backend,
                max_model_len=max_length,
                max_num_seqs=min(max_num_seqs, max_batch_size or max_num_seqs),
                max_num_batched_tokens=max_num_batched_tokens,
                gpu_memory_utilization=gpu_memory_utilization,
            )
            generator = llm.generator
        self.generator = generator
        if self.generator.tokenizer is None:
            raise ValueError("the generator has no tokenizer, which an evaluation needs for text")
        self.tokenizer = self.generator.tokenizer
        self._device = self.generator.model.device
        self._name = pretrained
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self.enable_thinking, self.think_end_token = enable_thinking, think_end_token
        self.add_bos_token, self._prefix = add_bos_token, prefix_token_id

    # What the harness asks about a model

    @property
    def _ends(self) -> tuple[int, ...]:
        return self.tokenizer.eos_ids or self.generator.config.eos_token_ids

    @property
    def eot_token_id(self) -> int | None:
        return self._ends[0] if self._ends else None

    @property
    def prefix_token_id(self) -> int:
        for token in (self._prefix, self.tokenizer.bos_id, self.eot_token_id):
            if token is not None:
                return token
        raise ValueError(
            "the tokenizer has neither BOS nor an end token: name what stands before a text as prefix_token_id"
        )

    @property
    def max_length(self) -> int:
        return self.generator.max_model_len

    @property
    def batch_size(self) -> int:
        return self.generator.max_num_seqs

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. A text that begins with BOS, as chat templates write it, does not get a second one."""
        if not string:
            return []
        bos = self.tokenizer.bos_id
        if add_special_tokens is None:
            written = None if bos is None else self.tokenizer.token_text(bos)
            add_special_tokens = not has_bos_prefix(string, written) and self.add_bos_token is not False
            if add_special_tokens and self.add_bos_token and bos is not None:
                return [bos, *self.tokenizer.encode(string, add_special_tokens=False)]
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, which the harness keeps with its results."""
        if chat_template is False or chat_template is None:
            return None
        if isinstance(chat_template, str):
            raise ValueError(
                f"the chat template {chat_template!r} is asked for; a tokenizer has one here, without a name"
            )
        if not self.tokenizer.has_chat_template:
            raise ValueError("the model has no chat template: leave out --apply_chat_template")
        return self.tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without add_generation_prompt its last message is left open, to be continued."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        text = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt, **thinking)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        at = text.rfind(last)
        if at < 0:
            raise ValueError("the chat template changes the last message, which so cannot be continued")
        return text[: at + len(last)]

    # Requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            raise ValueError("enable_thinking goes with tasks that generate, and this one compares probabilities")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, but the context is {self.max_length}: wanted at "
                    f"most {self.max_length}"
                )
            pairs.append((context[-room:], continuation))
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Scoring") as bar:
            scores = self.generator.score(pairs, progress=lambda done: bar.update(done - bar.n))
        answers = [(score.total, score.is_greedy) for score in scores]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(piece)) for piece in pieces]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [(str(request.args[0]), dict(request.args[1])) for request in requests]
        times: Counter[str] = Counter()
        prompts, params, stops = [], [], []
        for context, settings in asked:
            prompt, sampling, until = self._request(context, settings, times[context])
            times[context] += 1
            prompts.append(prompt)
            params.append(sampling)
            stops.append(until)
        answers: list[str] = []
        with tqdm(total=len(asked), disable=disable_tqdm, desc="Generating") as bar:
            step = _AT_ONCE * self.generator.max_num_seqs
            for start in range(0, len(asked), step):
                part = slice(start, start + step)
                results = self.generator.generate(
                    prompts[part],
                    params[part],
                    self.options,
                    progress=lambda done, start=start: bar.update(start + done - bar.n),  # type: ignore[misc]
                )
                for result, (context, settings), until in zip(results, asked[part], stops[part], strict=True):
                    if result.error is not None:
                        raise RuntimeError(f"a decode failed: {result.error}")
                    answers.append(postprocess_generated_text(result.text, until, self.think_end_token))
                    self.cache_hook.add_partial("generate_until", (context, settings), answers[-1])
        return answers

    def _request(
        self, context: str, settings: dict[str, Any], times: int
    ) -> tuple[list[int], SamplingParams, list[str]]:
        """Prompt, parameters and stop strings of a request; `times` the same prompt came before."""
        wanted = normalize_gen_kwargs(settings, self.max_gen_toks)
        if unknown := sorted(set(wanted) - _OF_THE_HARNESS - {*_SAMPLING, *_PENALTIES}):
            known = ", ".join((*_SAMPLING, *_PENALTIES, "until"))
            raise ValueError(f"gen_kwargs holds {', '.join(unknown)}, wanted {known}")
        until = [stop for stop in wanted["until"] if stop]
        prompt, count = maybe_truncate(
            self.tok_encode(context) or [self.prefix_token_id],
            max_gen_toks=wanted["max_gen_toks"],
            max_model_len=self.max_length,
            shrink_gen_toks=True,  # an answer that is cut off tells more than one to a prompt that was
        )
        digest = hashlib.sha256(f"{self.seed} {context}".encode("utf-8", "surrogatepass")).digest()
        sampling = {name: wanted[name] for name in _SAMPLING if name in wanted} if wanted["do_sample"] else {}
        sampling |= {name: wanted[name] for name in _PENALTIES if name in wanted}
        params = SamplingParams(
            max_tokens=count,
            stop=() if self.think_end_token else until,
            seed=mixed_seed(int.from_bytes(digest[:8], "big"), times),
            **sampling,
        )
        return prompt, params, until
