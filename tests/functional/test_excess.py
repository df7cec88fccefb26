"""The loss above that of the class means, against sums in hundreds of digits.

Relative errors found in float64, the largest over classes, orders and chunks, by the spread of the features:

| logits about | spread 1 | 1e-3 | 1e-8 | 1e-14 | tolerance |
|---|---|---|---|---|---|
| all, MSE | 3e-16 | 4e-16 | 4e-16 | 3e-16 | 1e-14: some tens of roundings of a sum of squares |
| 1e-3, CE | 4e-16 | 5e-16 | 4e-16 | 4e-16 | the same |
| 1, CE | 8e-16 | 1e-15 | 5e-16 | 8e-16 | the same |
| 30, CE | 5e-15 | 2e-14 | 2e-14 | 8e-15 | and 10 eps times the logits: probabilities are known to that |
| 1e4, CE | 1e-15 | 2e-12 | - | 2e-12 | the same; - is below the least number of float64 |

Equal features give exact zeros.
"""

import mpmath
import pytest
import torch
from mpmath import mp, mpf

from nclightning.functional import ExcessLoss, HeadLoss
from nclightning.problems import CrossEntropy, SquaredError
from nclightning.problems.cross_entropy import _cumulant

K, N, D = 3, 6, 4
LOSSES = {"mse": SquaredError(), "ce": CrossEntropy()}
# The least sums that float64 knows, of losses up to 1e5, with some to spare.
DIGITS = 340


def head_loss(loss, weight, bias):
    return HeadLoss(LOSSES[loss], torch.eye(len(weight)).to(weight), weight, bias)


def exact_sums(loss, weight, bias, features, labels):
    """Sum of the losses minus n times the loss at the mean, without any thought of cancellation."""
    with mp.workdps(DIGITS):
        rows, biases = [[mpf(x) for x in row] for row in weight.tolist()], [mpf(x) for x in bias.tolist()]

        def value(h, y):
            z = [
                mpmath.fsum(w * x for w, x in zip(row, h, strict=True)) + b for row, b in zip(rows, biases, strict=True)
            ]
            if loss == "mse":
                return mpmath.fsum((each - (k == y)) ** 2 for k, each in enumerate(z)) / 2
            largest = max(z)
            return largest + mpmath.log(mpmath.fsum(mpmath.exp(each - largest) for each in z)) - z[y]

        sums = []
        for y in range(len(weight)):
            own = [[mpf(x) for x in h] for h in features[labels == y].tolist()]
            mean = [mpmath.fsum(column) / len(own) for column in zip(*own, strict=True)]
            sums.append(mpmath.fsum(value(h, y) for h in own) - len(own) * value(mean, y) if own else mpf(0))
        return [float(each) for each in sums]


def draw(generator, *shape):
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def gather(head, features, labels, size, num_classes=K):
    excess = ExcessLoss.empty(num_classes, features.shape[1], num_classes)
    for rows, own in zip(features.split(size), labels.split(size), strict=True):
        excess = excess.add(rows, own, head)
    return excess


def check(excess, expected, tolerance):
    for value, truth in zip(excess.sums.tolist(), expected, strict=True):
        assert value >= 0
        # Below the range of float64 there is nothing to see.
        assert value == pytest.approx(truth, rel=tolerance, abs=1e-290)


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize(
    ("spread", "dtype"),
    [(spread, torch.float64) for spread in (1.0, 1e-3, 1e-8, 1e-14)]
    + [(0.1, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    ids=str,
)
def test_equals_sums_in_many_digits(loss, scale, spread, dtype, generator):
    labels = torch.arange(K).repeat_interleave(N)
    weight, bias = scale * draw(generator, K, D), draw(generator, K)
    features = (draw(generator, K, D)[labels] + spread * draw(generator, len(labels), D)).to(dtype)
    expected = exact_sums(loss, weight, bias, features, labels)
    tolerance = 1e-14 if loss == "mse" else 1e-14 + 2e-15 * float((features.double() @ weight.T).abs().max())
    head = head_loss(loss, weight, bias)
    for order in (torch.arange(len(labels)), torch.randperm(len(labels), generator=generator)):
        for size in (1, 5, 7, len(labels)):  # In the order of classes 5 leaves single samples behind.
            check(gather(head, features[order], labels[order], size), expected, tolerance)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_equal_features_give_exact_zeros(loss, generator):
    """Of numbers that do not add up exactly: their mean in float64 is not one of them."""
    labels = torch.arange(K).repeat(N)
    features = draw(generator, K, D)[labels] * 0.1
    assert not torch.equal(features[labels == 0].mean(dim=0), features[0])
    head = head_loss(loss, draw(generator, K, D), None)
    for size in (1, 5, len(labels)):
        assert not gather(head, features, labels, size).sums.any()


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("away", [10.0, 1e3])
def test_an_outlier_that_comes_first_and_alone(loss, away, generator):
    """Sums around it, moved to the mean at the end, would lose as many digits as there are of n times the logits."""
    labels, features = torch.zeros(300, dtype=torch.int64), 1e-3 * draw(generator, 300, D)
    weight, bias = draw(generator, 2, D), draw(generator, 2)
    features[0] += away * (weight[0] - weight[1])  # Sure of its class.
    excess = gather(head_loss(loss, weight, bias), features, labels, [1, 150, 149], 2)
    tolerance = 1e-14 + (1e-15 * float((features @ weight.T).abs().max()) if loss == "ce" else 0)
    check(excess, exact_sums(loss, weight, bias, features, labels), tolerance)


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_merges_in_any_order_with_classes_missing(loss, generator):
    labels = torch.randint(K, (60,), generator=generator)
    features, weight = draw(generator, 60, D) + 100, draw(generator, K, D)
    head = head_loss(loss, weight, None)
    pieces = [gather(head, features[labels == k], labels[labels == k], 6) for k in range(K)]
    pieces += [gather(head, features, labels, 4), ExcessLoss.empty(K, D, K)]
    expected = exact_sums(loss, weight, torch.zeros(K), features.repeat(2, 1), labels.repeat(2))
    for order in (range(5), reversed(range(5)), [2, 4, 0, 3, 1]):
        total = ExcessLoss.empty(K, D, K)
        for i in order:
            total = total.merge(pieces[i], head)
        check(total, expected, 1e-12)  # Logits are about 300.
        assert torch.equal(total.counts, 2 * torch.bincount(labels, minlength=K).double())
        means = torch.stack([features[labels == k].mean(dim=0) for k in range(K)])
        torch.testing.assert_close(total.means, means, rtol=1e-14, atol=0)


def test_samples_left_out_and_not_finite(generator):
    labels = torch.tensor([0, 1, -1, 2, 9, 0, 2])
    features, head = draw(generator, 7, D), head_loss("ce", draw(generator, 4, D), None)
    expected = gather(head, features[[0, 1, 3, 5, 6]], labels[[0, 1, 3, 5, 6]], 5, 4)
    features[2], features[4] = torch.nan, torch.inf
    for size in (1, 7):
        excess = gather(head, features, labels, size, 4)
        check(excess, expected.sums.tolist(), 1e-14)
        assert excess.counts.tolist() == [2, 1, 2, 0]
        assert excess.sums[3] == 0
    features[0] = torch.nan
    assert gather(head, features, labels, 7, 4).sums.isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_nothing_comes_to_the_host(loss):
    """On the meta device there is nothing to bring."""
    on = {"device": "meta", "dtype": torch.float64}
    head = head_loss(loss, torch.empty(K, D, **on), torch.empty(K, **on))
    excess = ExcessLoss.empty(K, D, K, "meta")
    for _ in range(2):
        excess = excess.add(torch.empty(30, D, device="meta"), torch.empty(30, dtype=torch.int64, device="meta"), head)
    assert excess.merge(excess, head).sums.shape == (K,)


def test_rows_with_small_and_large_changes_do_not_matter_to_each_other(generator):
    """A CPU leaves out the branch that no row takes."""
    table = torch.log_softmax(1e3 * draw(generator, 20, K), dim=1)
    change = torch.cat([1e3 * draw(generator, 10, K), draw(generator, 10, K)])
    together = _cumulant(table, change)
    for i in range(20):
        assert float(_cumulant(table[i : i + 1], change[i : i + 1])) == float(together[i])


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_many_classes_a_few_rows_at_a_time(loss, generator):
    """Rows, classes and chunks go in tiles of several sizes."""
    labels = torch.randint(300, (2000,), generator=generator)
    features, weight = draw(generator, 2000, 3), draw(generator, 300, 3)
    excess = gather(head_loss(loss, weight, None), features, labels, 900, 300)
    z, means = features @ weight.T, excess.means @ weight.T
    phi = (lambda z: z.square().sum(dim=1) / 2) if loss == "mse" else (lambda z: z.logsumexp(dim=1))
    sums = torch.zeros(300, dtype=torch.float64).index_add_(0, labels, phi(z)) - excess.counts * phi(means)
    torch.testing.assert_close(excess.sums, sums, rtol=1e-11, atol=1e-11)
