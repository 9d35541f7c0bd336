"""The coverage tool: what it calls exact is exact, and what is not it says so, whatever goes wrong."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ppcompile

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks is not installed

from benchmarks.coverage import check as checking
from benchmarks.coverage.check import Result, check, example_groups
from benchmarks.coverage.configs import APART, GENTLE, OPTIONS, VOCABULARY, configuration, registered_types
from benchmarks.coverage.models import build, lonely_kinds
from benchmarks.coverage.sweep import sweep
from benchmarks.coverage.table import headline, markdown


def checked(kind: str) -> Result:
    return check(kind, lambda: build(kind), VOCABULARY)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer is enough to be wrong with."""
    for kind in ("llama", "mistral"):
        monkeypatch.setitem(OPTIONS, kind, {"num_hidden_layers": 1})


def test_exact_with_what_was_measured() -> None:
    result = checked("gpt_oss")
    assert result.outcome == "exact"
    assert result.forward is not None
    assert 0 < result.forward <= checking.FORWARD
    assert result.gradient is not None
    assert 0 < result.gradient <= checking.GRADIENT
    assert result.masks == {"window(9), sinks": 2, "causal, sinks": 2}
    assert result.notes == ()


def test_float64_decides_where_a_gradient_is_zero_but_for_rounding() -> None:
    result = checked("bert")
    assert result.outcome == "exact"
    assert result.double
    assert "key.bias" in result.reason
    assert result.gradient is not None
    assert result.gradient <= checking.DOUBLE


def test_refused_with_the_reason() -> None:
    result = checked("cpmant")  # sees the whole row
    assert result.outcome == "refused"
    assert result.reason
    assert result.op


class Skewed(nn.Module):
    """Packed, and a little off: in the values, or in the gradients alone."""

    def __init__(self, packed: ppcompile.PackedModel, values: float, gradients: float) -> None:
        super().__init__()
        self.packed, self.values, self.gradients = packed, values, gradients

    def compiled(self) -> object:
        return self.packed.compiled()

    def forward(self, batch: ppcompile.PackedBatch) -> ppcompile.PackedOutput:
        out = self.packed(batch)
        logps = out.token_logps
        skewed = logps * (1 + self.gradients) - logps.detach() * self.gradients
        skewed = torch.cat([skewed[:-1], skewed[-1:] + self.values])  # one token of all
        return ppcompile.PackedOutput(out.logps, skewed, out.lengths)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(("values", "gradients"), [(1e-4, 0.0), (0.0, 2e-3), (float("nan"), 0.0)])
def test_a_little_off_is_wrong(monkeypatch: pytest.MonkeyPatch, values: float, gradients: float) -> None:
    wrap = ppcompile.wrap
    monkeypatch.setattr(ppcompile, "wrap", lambda model: Skewed(wrap(model), values, gradients))
    assert checked("llama").outcome == "wrong"


@pytest.mark.usefixtures("shallow")
def test_a_window_that_is_one_token_too_wide_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    wrap = ppcompile.wrap

    def wrap_another(model: nn.Module) -> nn.Module:
        another = copy.deepcopy(model)
        another.config.sliding_window += 1
        return wrap(another)

    monkeypatch.setattr(ppcompile, "wrap", wrap_another)
    result = checked("mistral")
    assert result.outcome == "wrong"
    assert result.forward is not None
    assert result.forward > checking.SENSITIVE


@pytest.mark.usefixtures("shallow")
def test_a_crash_of_the_compiler_is_its_own_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(model: nn.Module) -> nn.Module:
        raise KeyError(type(model).__name__)

    monkeypatch.setattr(ppcompile, "wrap", crash)
    result = checked("llama")
    assert result.outcome == "crash"
    assert "KeyError: 'LlamaForCausalLM'" in result.reason
    assert "crash: raise KeyError" in result.trace


def test_a_model_that_sees_no_other_token_is_noted() -> None:
    class Unseeing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.words(ids))

    result = check("unseeing", lambda: Unseeing().eval(), VOCABULARY)
    assert result.outcome == "exact"  # it is: there is nothing to keep apart
    assert [note for note in result.notes if "see each other" in note]
    assert [note for note in result.notes if "first token" in note]


def test_each_type_has_a_process_of_its_own() -> None:
    out_of_time, unknown = sweep(["llama", "no_such_type"], jobs=2, seconds=1)
    assert out_of_time.outcome == "timeout"
    assert unknown.outcome == "not built"
    assert "no_such_type" in unknown.reason


def test_every_registered_type_has_a_configuration_or_is_listed_apart() -> None:
    registered = set(registered_types())
    assert APART.keys() <= registered
    assert registered >= GENTLE
    for kind in sorted(registered - APART.keys()):
        configuration(kind)


def test_an_option_that_a_type_does_not_have_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONS, "llama", {"sliding_windows": 4})
    with pytest.raises(ValueError, match=r"LlamaConfig has no option sliding_windows; fix OPTIONS\['llama'\]"):
        configuration("llama")


def test_a_lone_layer_of_a_kind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lonely_kinds(build("gemma2")) == {}
    monkeypatch.setitem(OPTIONS, "gemma2", {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]})
    lonely = lonely_kinds(build("gemma2"))
    assert lonely == {"model.layers": ["layer_type=full_attention", "sliding_window=None"]}


def test_the_groups_have_what_they_promise() -> None:
    groups = example_groups(VOCABULARY)
    lengths = [len(response) for group in groups for response in group.responses]
    assert len(set(lengths)) > 5
    batch = ppcompile.pack(groups, share="tree", pad_to_multiple_of=16)
    assert batch.num_tokens < ppcompile.pack(groups, share="prompt").num_tokens  # beginnings are shared
    assert batch.num_slots > batch.num_tokens  # padded


def test_the_table() -> None:
    results = [
        Result("a", "exact", 1e-6, 1e-5, "w", sites=2, masks={"window(9)": 2}, seconds=1.0),
        Result("b", "refused", reason="mixes | tokens", op="aten.roll", module="m"),
    ]
    text = markdown(results, {"c": "is apart"})
    assert headline(results, {"c": ""}) == "1 exact (50.0% of 2), 0 wrong, 1 refused, 1 listed apart"
    assert "| a | 1.0e-06 | 1.0e-05 | 2 | 2 x `window(9)` |  | 1.0 |" in text
    assert "mixes \\| tokens" in text
    assert "| c | is apart |" in text
