"""The structs of the compiled module: those of the headers, field by field."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

from tests.native.support import ROOT

HEADERS = (ROOT / "csrc" / "include" / "idlm" / f"{name}.h" for name in ("sampling", "gemm", "attention"))
STRUCTS = dict(re.findall(r"^struct (\w+) \{\n(.*?)^\};", "".join(h.read_text() for h in HEADERS), re.M | re.S))


@pytest.mark.parametrize("name", STRUCTS)
def test_every_field_of_a_struct_can_be_given_and_has_the_default_of_the_header(name: str, module: ModuleType) -> None:
    fields = re.sub(r"//.*|\[\w+\] = \{\}", "", STRUCTS[name])
    declared = dict(re.findall(r"(\w+)(?: = ([\w:.-]+))?;", fields))
    made = getattr(module, name)()
    assert {field for field in dir(made) if not field.startswith("_")} == set(declared)
    usual = {"": None, "nullptr": 0, "true": True, "false": False}
    usual |= {"DType::kBFloat16": 0, "DType::kFloat32": 2, "kStreamTarget": 0, "1.0f": 1}
    for field, default in declared.items():
        wanted = usual[default] if default in usual else int(default)
        assert wanted is None or getattr(made, field) == wanted, field
        if wanted is not None:
            given = not wanted if isinstance(wanted, bool) else wanted + 1
            assert getattr(getattr(module, name)(**{field: given}), field) == given


def test_an_array_takes_as_many_values_as_it_holds(module: ModuleType) -> None:
    assert module.AdapterParams(slice_ends=[3, 5]).slice_ends[:3] == [3, 5, 0]
    with pytest.raises(ValueError, match="slice_ends holds 16 values"):
        module.AdapterParams(slice_ends=[1] * 17)


def test_structs_hold_structs_and_no_other_fields(module: ModuleType) -> None:
    params = module.SampleRowsParams(logits=module.Logits(vocab_size=7), ids=1 << 40)
    params.logits.mask_id = 3
    assert (params.logits.vocab_size, params.logits.mask_id, params.ids) == (7, 3, 1 << 40)
    with pytest.raises(AttributeError, match="seeds"):
        module.SamplingParams(seeds=1)
    with pytest.raises(TypeError):
        module.Logits(vocab_size="7")
