"""VAR against the official implementation: every run of the golden file, the teacher-forced pass, the tokenizer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import var_golden as golden
from recorder import Recorder
from torch import Tensor
from var_golden import ABSENT, HERE, RUNS, Run, gap, tensor

from heatkv_cli.core.budget import Budget
from heatkv_cli.core.cache import KVCache
from heatkv_cli.core.policy import Visit
from heatkv_cli.methods.base import Setting
from heatkv_cli.methods.full import Full
from heatkv_cli.models.var.sampling import filter_logits
from heatkv_cli.models.var.tokenizer import Size

pytestmark = [pytest.mark.golden, pytest.mark.skipif(not HERE, reason=ABSENT)]

NAMES = list(RUNS)


def same_stream(run: Run) -> bool:
    """Whether `torch.multinomial`, as upstream calls it, draws the recorded codes from the recorded logits here."""
    generator = run.generators[0]
    for s, codes in enumerate(run.codes):
        logits = filter_logits(tensor(f"o.{run.name}.s{s}.cfg_logits"), run.settings["top_k"], run.settings["top_p"])
        p = logits.softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(p, 1, replacement=True, generator=generator)
        if not torch.equal(drawn.view(codes.shape), codes):
            return False
        if run.settings["more_smooth"]:
            torch.empty(logits.shape).exponential_(generator=generator)
    return True


@pytest.mark.parametrize("name", NAMES)
def test_a_forced_run(name: str) -> None:
    run = Run(name, RUNS[name])
    if run.settings["more_smooth"]:
        pytest.skip("its inputs are mixtures, which codes alone do not give")
    model, cache = run.build(), Recorder()
    result = golden.generate(run, cache, forced=True, model=model)
    assert not golden.beyond(golden.errors(run, model, result))
    assert cache.ended == len(run.codes)
    for part, stored in (("k", cache.k), ("v", cache.v)):
        for layer in stored:
            key = f"o.{name}.block{layer}.cached_{part}"
            if key in golden.names():
                assert gap(stored[layer], tensor(key)) < golden.STATE
    if run.settings["top_k"] == 1:
        assert all(torch.equal(logits.argmax(-1), c) for logits, c in zip(result.trace.logits, run.codes, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_from_its_seed(name: str) -> None:
    run = Run(name, RUNS[name])
    if not same_stream(run):
        pytest.skip(f"torch {torch.__version__} draws other numbers than torch {golden.META['torch']} from one seed")
    model = run.build()
    result = golden.generate(run, Recorder(), forced=False, model=model)
    assert all(torch.equal(a, b) for a, b in zip(result.trace.codes, run.codes, strict=True))
    assert not golden.beyond(golden.errors(run, model, result))


class LastScale:
    """Observer: all keys and values of every layer, when the last scale attends to them."""

    def __init__(self, last: int) -> None:
        self.last, self.k, self.v = last, {}, {}  # type: ignore[var-annotated]

    def observe(self, visit: Visit) -> None:
        if visit.scale == self.last:
            view = visit.view()
            self.k[visit.layer], self.v[visit.layer] = view.k, view.v


@pytest.mark.parametrize("name", NAMES)
def test_a_run_through_the_cache_of_the_package(name: str) -> None:
    run = Run(name, RUNS[name])
    if run.settings["more_smooth"]:
        pytest.skip("its inputs are mixtures, which codes alone do not give")
    model = run.build()
    rows, seen = model.rows(len(run.classes), run.sampling), LastScale(len(run.codes) - 1)
    policy = Full().policy(Setting(model.geometry, Budget.parse("1"), rows))
    cache = KVCache(model.geometry, policy, rows, len(run.classes), observers=[seen])
    result = golden.generate(run, cache, forced=True, model=model)
    assert not golden.beyond(golden.errors(run, model, result))
    for part, stored in (("k", seen.k), ("v", seen.v)):
        key = f"o.{name}.block3.cached_{part}"
        if key in golden.names():
            assert gap(stored[3], tensor(key)) < golden.STATE


def test_the_teacher_forced_pass() -> None:
    """All scales at once under a mask, with the class of each row, no guidance."""
    net, inputs = golden.transformer(), tensor("o.T_teacher.x_BLCv")
    wanted = tensor("o.T_teacher.logits")
    level = torch.cat([torch.full((h * w,), s) for s, (h, w) in enumerate(net.config.sizes)])

    class Masked:
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, level[:, None] >= level, scale=softmax_scale)

    cond, places = net.condition(torch.tensor(RUNS["A_greedy"]["label_B"])), net.positions()
    x = torch.cat((net.start(cond, places[:, :1]), net.embed(inputs, places[:, 1:])), 1)
    assert gap(net.logits(net.run(x, cond, Masked()), cond), wanted) < golden.LOGITS


def sizes() -> tuple[Size, ...]:
    return golden.transformer().config.sizes


def test_the_tokenizer_encodes() -> None:
    net, image = golden.tokenizer(), tensor("o.V.inp_img")
    assert gap(net.features(image), tensor("o.V.f")) < golden.LOGITS
    total, codes = net.encode(image, sizes())
    assert all(torch.equal(c, tensor(f"o.V.idx{s}").long()) for s, c in enumerate(codes))
    assert gap(total, tensor("o.V.fhat_last")) < golden.STATE
    assert gap(net.quantize.totals(codes, sizes())[-1], tensor("o.V.fhat_from_idx")) < golden.STATE


def test_the_tokenizer_decodes_and_gives_inputs() -> None:
    net = golden.tokenizer()
    codes = [tensor(f"o.V.idx{s}").long() for s in range(len(sizes()))]
    image = net.decode(net.quantize.totals(codes, sizes())[-1])
    assert gap(image, tensor("o.V.rec_img")) < golden.IMAGE
    assert gap(net.quantize.inputs(codes, sizes()), tensor("o.V.var_input")) < golden.STATE
