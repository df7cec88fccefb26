"""The closed form along any direction, and its inner products."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nclightning.models import closed_form
from nclightning.models.closed_form import UFMObjective
from nclightning.optim import ArmijoGD
from nclightning.ranks import own_rows
from tests.models.lines import LOSSES, TOLERANCE, any_lines, lines
from tests.processes import on

ROWS_AT_A_TIME = {"at once": 2**17, "a row or so at a time": 7}


@pytest.fixture(params=ROWS_AT_A_TIME.values(), ids=ROWS_AT_A_TIME)
def rows_at_a_time(request, monkeypatch):
    monkeypatch.setattr(closed_form, "ELEMENTS_PER_STEP", request.param)


def directions(like, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype) for p in like]


@pytest.mark.usefixtures("rows_at_a_time")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
@torch.no_grad()
def test_value_slope_and_gradient_along_a_direction_are_those_of_autograd(loss, with_bias, dtype):
    """From the second search on a slope comes with the value; the last two take none, or one of an earlier trial."""
    ours, theirs, params, twins = any_lines(loss, dtype, with_bias)
    here, tolerance = ours.evaluate(), TOLERANCE[dtype]
    for number, asked in enumerate([(False, True), (True, True), (False, False), (True, False)]):
        along = directions(params, number)
        kept, before = [p.clone() for p in along], [p.detach().clone() for p in params]
        start = [g.clone() for g in here.gradients]
        ours.begin(here, along)
        for size, with_slope in zip((0.5, -0.02), asked, strict=True):
            for q, x, p in zip(twins, before, kept, strict=True):
                torch.sub(x, p, alpha=size, out=q)
            there = theirs.evaluate()
            assert ours.trial(size) == pytest.approx(there.value, rel=tolerance)
            if with_slope:
                products = [(g.double() * p.double()).sum() for g, p in zip(there.gradients, kept, strict=True)]
                scale = sum(abs(float(each)) for each in products)
                assert ours.slope() == pytest.approx(float(sum(products)), abs=20 * tolerance * scale)
            assert not ours.stands_still()
        assert all(map(torch.equal, params, before))
        assert all(map(torch.equal, here.gradients, start))
        here = ours.accept()
        for x, p, now in zip(before, kept, params, strict=True):
            assert torch.equal(now, torch.sub(x, p, alpha=size))
        assert all(map(torch.equal, along, kept))
        assert here.square == pytest.approx(there.square, rel=20 * tolerance)
        for a, b in zip(here.gradients, there.gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("loss", ["mse", "ce"])
@torch.no_grad()
def test_the_gradient_is_a_direction_like_any_other(loss):
    """Bit for bit, whether it is left out, given, or given in other memory."""
    found = []
    for direction in (lambda _: None, lambda gradients: gradients, lambda gradients: [g.clone() for g in gradients]):
        line, _, params = lines(loss, (4, 3, 6))
        here, numbers = line.evaluate(), []
        for number in range(4):
            line.begin(here, direction(here.gradients))
            numbers += [line.trial(0.5), *([line.slope()] if number % 2 else []), line.trial(0.1)]
            here = line.accept()
            numbers += [here.value, here.square]
        found.append((numbers, [p.detach().clone() for p in params]))
    (numbers, reached), *others = found
    for other, there in others:
        assert other == numbers
        assert all(map(torch.equal, there, reached))


@torch.no_grad()
def test_a_missing_entry_stays_where_it_is():
    line, _, params = lines("mse", (4, 3, 6))
    before, along = [p.detach().clone() for p in params], directions(params)
    for missing in range(3):
        line.begin(line.evaluate(), [None if i == missing else p for i, p in enumerate(along)])
        line.trial(0.1)
        line.accept()
        moved = [not torch.equal(p, x) for p, x in zip(params, before, strict=True)]
        assert moved == [i != missing for i in range(3)]
        for p, x in zip(params, before, strict=True):
            p.copy_(x)


@torch.no_grad()
def test_a_search_along_a_direction_that_found_nothing_leaves_the_start_as_it_was():
    line, _, params = lines("ce", (4, 3, 6))
    start, along = line.evaluate(), directions(params)
    before = [x.detach().clone() for x in (*params, *start.gradients, *along)]
    line.begin(start, along)
    for size in (1.0, 0.5):
        line.trial(size)
        line.slope()
    line.trial(1e-30)
    assert line.stands_still()
    line.reject()
    assert all(map(torch.equal, (*params, *start.gradients, *along), before))


@pytest.mark.usefixtures("rows_at_a_time")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_inner_products_are_summed_in_float64(scale, dtype):
    line, _, params = lines("mse", (4, 3, 6), dtype)
    one, other = directions(params), directions(params, 1)
    one = [scale * x for x in one]
    holes = [None, *other[1:]], [*other[:2], None]
    pairs = [(one, one), (one, other), (one, holes[0]), (holes[1], one), ([None] * 3, one)]
    products = line.inner_products(pairs)
    assert products.dtype == torch.float64
    for product, (left, right) in zip(products.tolist(), pairs, strict=True):
        parts = [(a.double(), b.double()) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
        reference = sum((a * b).sum().item() for a, b in parts)
        size = sum((a * b).abs().sum().item() for a, b in parts)
        assert product == pytest.approx(reference, rel=0, abs=1e-14 * size)  # Of a hundred roundings of each term.


SHARED_ROWS = 20


def shared_line(first=0, count=SHARED_ROWS, *, shared=False):
    """The rows of one process, or all of them; mean-square loss with a bias."""
    generator = torch.Generator().manual_seed(3)
    whole = [nn.Parameter(torch.randn(*shape, generator=generator).double()) for shape in ((4, 6), (4,), (20, 6))]
    labels = torch.arange(4).repeat_interleave(5)
    *head, features = whole
    features = nn.Parameter(features.detach()[first : first + count].clone())
    labels = labels[first : first + count]
    line = UFMObjective(LOSSES["mse"](), features, head, labels, [*head, features], SHARED_ROWS, shared)
    return line, [*head, features], slice(first, first + count)


@torch.no_grad()
def walk(line, params, rows):
    """A search along a direction, all that it tells, and where it ends."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda: [torch.randn(*s, generator=generator).double() for s in ((4, 6), (4,), (20, 6))]  # noqa: E731
    vectors = [[*head, features[rows]] for *head, features in (draw(), draw())]
    numbers, here = [], line.evaluate()
    for along, with_slope in zip(itertools.cycle(vectors), (True, True, False), strict=False):
        line.begin(here, along)
        numbers += [line.trial(0.1), *([line.slope()] if with_slope else [])]
        here = line.accept()
        numbers += [here.value, here.square]
        numbers += line.inner_products([(along, here.gradients), (here.gradients, here.gradients)]).tolist()
    product = line.hessian_product(vectors[0])
    return numbers, [p.detach().clone() for p in params], product


def share():
    first, count = own_rows(SHARED_ROWS, dist.get_rank(), dist.get_world_size())
    return walk(*shared_line(first, count, shared=True))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_that_share_rows_search_as_one(world, tmp_path):
    numbers, (*head, features), (*of_head, of_features) = walk(*shared_line())
    results = on(world, tmp_path, share, group=True)
    close = {"rtol": 0, "atol": 1e-13}  # Sums in another order.
    for theirs, (*weights, _), (*products, _) in results:
        assert theirs == results[0][0]
        assert theirs == pytest.approx(numbers, rel=1e-13)
        for ours, other in zip((*head, *of_head), (*weights, *products), strict=True):
            torch.testing.assert_close(ours, other, **close)
    torch.testing.assert_close(torch.cat([params[-1] for _, params, _ in results]), features, **close)
    torch.testing.assert_close(torch.cat([products[-1] for *_, products in results]), of_features, **close)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_looking_leaves_a_search_as_it_is(loss):
    """Inner products, Hessian products and readings between the steps of a run that slopes decide at the end."""
    reached = []
    for looks in (False, True):
        line, _, params = lines(loss, (4, 3, 6))
        optimizer = ArmijoGD(params)
        for _ in range(200):
            optimizer.step(line)
            if looks:
                gradients = [p.grad for p in params]
                line.inner_products([(gradients, gradients)])
                line.hessian_product(gradients)
        reached.append([optimizer.total_evaluations, *(p.detach().clone() for p in params)])
    assert reached[0][0] == reached[1][0]
    assert all(map(torch.equal, reached[0][1:], reached[1][1:]))
