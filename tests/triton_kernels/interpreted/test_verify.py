"""verify against its torch reference, and the reference against medusa-llm's typical acceptance."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from medusa_apar.triton_kernels import reference
from medusa_apar.triton_kernels.reference import Noise, TypicalAcceptance
from medusa_apar.triton_kernels.verify import VerifyWorkspace, verify

# The interpreter takes milliseconds a program: few examples, each of them ragged.
few = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
CHUNK = 16
POISON = -(2**31) + 7


@pytest.fixture(autouse=True)
def _small_noise_blocks(monkeypatch):
    """So that a chunk of this file has two."""
    monkeypatch.setattr("medusa_apar.triton_kernels.verify._NOISE_BLOCK", CHUNK // 2)


@st.composite
def forests(draw, max_threads=3, max_nodes=5, vocabs=(1, 2, 5, 16, 17, 40), dtypes=None):
    """Arguments of verify; few distinct tokens, so that guesses are often right and siblings often alike."""
    vocab = draw(st.sampled_from(vocabs))
    counts = draw(st.lists(st.integers(0, max_nodes + 1), min_size=1, max_size=max_threads))
    padding = draw(st.integers(0, 2))
    rows = max(1, sum(counts) + padding)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(dtypes or (torch.float32, torch.float16, torch.bfloat16)))
    # Whole numbers tie often. A few values are special.
    logits = torch.randint(-3, 4, (rows, vocab), generator=generator).to(dtype)
    if draw(st.booleans()):
        logits = torch.randn(rows, vocab, generator=generator).to(dtype)
    for value in draw(st.lists(st.sampled_from([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0]), max_size=3)):
        logits[torch.randint(rows, (1,), generator=generator), torch.randint(vocab, (2,), generator=generator)] = value
    parents, first_rows = [], [0]
    for count in counts:
        first = first_rows[-1]
        chain = draw(st.booleans())  # long paths
        above = [first + node - 1 if chain else draw(st.integers(first, first + node - 1)) for node in range(1, count)]
        parents += [-1] * min(count, 1) + above
        first_rows.append(first + count)
    parents += [-1] * (rows - len(parents))
    scores = logits.float()
    guesses = scores.argmax(-1)[torch.tensor(parents).clamp(min=0)]
    wrong = torch.randint(-1, vocab + 1, (rows,), generator=generator)
    tokens = torch.where(torch.rand(rows, generator=generator) < 0.7, guesses, wrong).int()
    control = draw(st.sampled_from([None, (0, vocab - 1), (vocab // 2, 0)]))
    bans = draw(st.none() | st.just(torch.randint(0, 4, (rows,), generator=generator).int()))
    return {
        "logits": logits,
        "tokens": tokens,
        "parents": torch.tensor(parents, dtype=torch.int32),
        "first_rows": torch.tensor(first_rows, dtype=torch.int32),
        "depth": draw(st.integers(0, max_nodes)),
        "bans": bans,
        "control": control,
    }


THRESHOLDS = [(0.09, 0.3), (0.3, 1.0), (0.0, 0.05), (1.0, 9.0)]


def noises(forest, sampled=(1,)):
    """Noise whose threads are each one of `sampled`."""
    threads, rows = len(forest["first_rows"]) - 1, len(forest["tokens"])
    words = st.integers(-(2**63), 2**63 - 1)
    positions = st.lists(st.integers(0, 2**32 - 1), min_size=rows, max_size=rows)
    per_thread = st.lists(words, min_size=threads, max_size=threads)
    flags = st.lists(st.sampled_from(sampled), min_size=threads, max_size=threads)
    return st.builds(
        lambda *lists, flags: Noise(*map(torch.tensor, lists), torch.tensor(flags, dtype=torch.int32)),
        *(per_thread, per_thread, positions),
        flags=flags,
    )


def thresholds(forest, *each):
    """float32 [T, 2]: these of the threads in turn; None is exact."""
    threads = len(forest["first_rows"]) - 1
    pairs = [each[thread % len(each)] or (-1.0, 0.3) for thread in range(threads)]
    return torch.tensor(pairs, dtype=torch.float32)


@st.composite
def mixtures(draw, **kinds):
    """A forest whose threads are greedy or sampled, exact or typical."""
    forest = draw(forests(**kinds))
    each = draw(st.lists(st.sampled_from([None, *THRESHOLDS]), min_size=1, max_size=len(forest["first_rows"]) - 1))
    return forest | {"noise": draw(noises(forest, (0, 1))), "typical": thresholds(forest, *each)}


def alone(forest, thread):
    """The launch of one of a forest's threads, as if there were no other mode than its own."""
    first, stop = forest["first_rows"][thread : thread + 2].tolist()
    noise, typical = forest["noise"], forest["typical"]
    own = {name: forest[name][first:stop] for name in ("logits", "tokens", "parents")}
    own["bans"] = None if forest["bans"] is None else forest["bans"][first:stop]
    own["parents"] = torch.where(own["parents"] < 0, -1, own["parents"] - first)
    own["first_rows"] = torch.tensor([0, stop - first], dtype=torch.int32)
    one = slice(thread, thread + 1)
    if noise.sampled[thread]:
        own["noise"] = Noise(noise.seeds[one], noise.keys[one], noise.positions[first:stop], noise.sampled[one])
    if typical[thread, 0] >= 0:
        own["typical"] = typical[one]
    return own | {"depth": forest["depth"], "control": forest["control"]}


def poisoned(forest, chunk=CHUNK):
    rows, vocab = forest["logits"].shape
    workspace = VerifyWorkspace.make(rows, len(forest["first_rows"]) - 1, vocab, forest["depth"], "cpu", chunk)
    workspace.best.fill_(2**63 - 1)
    workspace.stats.fill_(torch.nan)
    workspace.out.packed.fill_(POISON)
    return workspace


def assert_equals_reference(arguments, workspace=None):
    workspace = workspace or poisoned(arguments)
    before = arguments["logits"].clone()
    out = verify(**arguments, max_rows=8, workspace=workspace)
    expected = reference.verify(**arguments)
    assert out.packed.tolist() == expected.packed.tolist()
    assert workspace.counters.tolist() == [0] * len(workspace.counters)
    assert torch.equal(arguments["logits"].nan_to_num(7), before.nan_to_num(7))


@few
@given(forests())
def test_greedy(forest):
    assert_equals_reference(forest)


@settings(few, max_examples=4)
@given(st.data())
def test_sampling(data):
    forest = data.draw(forests())
    assert_equals_reference(forest | {"noise": data.draw(noises(forest))})


@few
@given(forests(vocabs=(2, 5, 17, 40)), st.sampled_from(THRESHOLDS))
def test_typical(forest, typical):
    assert_equals_reference(forest | {"typical": thresholds(forest, typical)})


@few
@given(mixtures(vocabs=(2, 5, 17, 40)))
def test_each_thread_has_a_mode_of_its_own(forest):
    """Greedy, sampled, exact and typical threads in one launch: each has the result of a launch of its own."""
    workspace = poisoned(forest)
    assert_equals_reference(forest, workspace)
    for thread, count in enumerate(forest["first_rows"].diff().tolist()):
        if count:
            single = alone(forest, thread)
            out, own = workspace.out, verify(**single, max_rows=8, workspace=poisoned(single))
            first = int(forest["first_rows"][thread])
            assert out.tokens[thread].tolist() == own.tokens[0].tolist()
            assert out.rows[thread].tolist() == [row + first if row >= 0 else -1 for row in own.rows[0].tolist()]
            assert (out.lengths[thread], out.last_rows[thread]) == (own.lengths[0], own.last_rows[0] + first)


# What a thread does with the tree of the test below: sampled, thresholds (None: exact), length.
MODES = [
    (0, None, 2),
    (1, None, 1),
    (0, (0.0, 0.3), 4),  # all that is possible
    (1, (1.0, 9.0), 1),  # nothing
    (0, (0.05, 9.0), 3),  # by the probability alone
    (1, (1.0, 2.5), 2),  # by the entropy alone
]


@pytest.mark.parametrize("shift", [0, len(MODES) // 2])
def test_modes_that_accept_differently_keep_apart(shift):
    """The same logits and draft tokens for all threads, the modes in another order each time."""
    modes = MODES[shift:] + MODES[:shift]
    threads = len(modes)
    logits = torch.zeros(4, 40)
    logits[0, 5], logits[1, 6], logits[1, 7], logits[2, 8] = 5.0, 4.0, 3.5, 5.0
    forest = {
        "logits": logits.repeat(threads, 1),
        "tokens": torch.tensor([4, 5, 7, 9], dtype=torch.int32).repeat(threads),
        "parents": torch.tensor([[-1, 4 * t, 4 * t + 1, 4 * t + 2] for t in range(threads)]).int().flatten(),
        "first_rows": 4 * torch.arange(threads + 1, dtype=torch.int32),
        "depth": 3,
    }
    ids = torch.full((threads,), 3)
    sampled = torch.tensor([sampled for sampled, _, _ in modes], dtype=torch.int32)
    forest["noise"] = Noise(ids, ids, torch.arange(4).repeat(threads), sampled)
    forest["typical"] = thresholds(forest, *(pair for _, pair, _ in modes))
    workspace = poisoned(forest)
    assert_equals_reference(forest, workspace)
    assert workspace.out.lengths.tolist() == [length for _, _, length in modes]


@settings(few, max_examples=4)
@given(mixtures(max_threads=2, vocabs=(40,)), st.integers(1, 99))
def test_the_order_of_programs_does_not_show(shuffled_programs, forest, seed):
    shuffled_programs(seed)
    workspace = poisoned(forest)
    for _ in range(2):  # a workspace is ready for the next launch
        workspace.out.packed.fill_(POISON)
        assert_equals_reference(forest, workspace)


@settings(few, max_examples=5)
@given(mixtures(vocabs=(40,)), st.sampled_from([8, 32, 64]))
def test_the_chunk_does_not_show(forest, chunk):
    assert_equals_reference(forest, poisoned(forest, chunk))


def rows_of(logits, **more):
    """A thread per row, without drafts."""
    count = len(logits)
    numbers = {"tokens": [0] * count, "parents": [-1] * count, "first_rows": list(range(count + 1))}
    tensors = {name: torch.tensor(values, dtype=torch.int32) for name, values in numbers.items()}
    return {"logits": logits, **tensors, "depth": 0, **more}


@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 0), (torch.float32, 6), (torch.bfloat16, 33)], ids=str)
def test_equals_and_values_that_are_no_numbers(dtype, far):
    """In the same block, in another block of the chunk, in another chunk."""
    inf, nan = torch.inf, torch.nan
    pairs = [
        (-0.0, 0.0),
        (0.0, -0.0),
        (nan, -nan),
        (-nan, nan),
        (inf, nan),
        (nan, inf),
        (inf, inf),
        (-inf, -inf),
        (2, 2),
    ]
    logits = torch.full((len(pairs), 40), -1.0)
    logits[[len(pairs) - 2]] = -inf
    for row, (here, there) in enumerate(pairs):
        logits[row, 3], logits[row, 4 + far] = here, there
    logits = logits.to(dtype)
    out = verify(**rows_of(logits, workspace=poisoned(rows_of(logits))))
    assert out.tokens[:, 0].tolist() == [reference.likeliest(row) for row in logits.float()]
    assert out.tokens[-2, 0] == -1 and (out.tokens[2:4, 0] == 0).all()  # nothing possible; NaN no more than nothing
    ids = torch.arange(len(pairs))
    assert_equals_reference(rows_of(logits, noise=Noise(ids, ids, ids, torch.ones_like(ids).int())))


@pytest.mark.parametrize("depth", range(7))
def test_a_path_is_cut_at_the_depth_asked_for(depth):
    generator = torch.Generator().manual_seed(depth)
    logits = 5 * torch.randn(12, 20, generator=generator)
    chosen = logits.argmax(-1).int()
    forest = {
        "logits": logits,
        "tokens": torch.cat([chosen[:1], chosen[:5], chosen[:1], chosen[6:11]]),
        "parents": torch.tensor([-1, 0, 1, 2, 3, 4, -1, 6, 7, 8, 9, 10], dtype=torch.int32),
        "first_rows": torch.tensor([0, 6, 12], dtype=torch.int32),
        "depth": depth,
    }
    assert_equals_reference(forest)
    assert_equals_reference(forest | {"typical": thresholds(forest, TypicalAcceptance())})
    assert verify(**forest, workspace=poisoned(forest)).lengths.tolist() == [min(depth, 5) + 1] * 2


@settings(few, max_examples=4)
@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([None, (3, 30)]))
def test_typical_thresholds_are_float64s(seed, sampled, control):
    """With delta a hair below and above p * exp(H), entropy and probability must be right to a hair."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 40, generator=generator)
    forest = {
        "logits": logits,
        "tokens": torch.tensor([4, int(torch.randint(4, 30, (1,), generator=generator))], dtype=torch.int32),
        "parents": torch.tensor([-1, 0], dtype=torch.int32),
        "first_rows": torch.tensor([0, 2], dtype=torch.int32),
        "depth": 1,
        "control": control,
        "bans": torch.ones(2, dtype=torch.int32),
    }
    if sampled:
        forest["noise"] = Noise(*(torch.tensor(ids) for ids in ([1], [2], [3, 4])), torch.ones(1, dtype=torch.int32))
    allowed = logits[0].double()
    if control is not None:
        allowed[list(control)] = -torch.inf
    chances = allowed.softmax(-1)
    edge = float(chances[forest["tokens"][1].item()] * (-torch.special.xlogy(chances, chances).sum()).exp())
    for delta, length in ((edge * (1 - 2e-5), 2), (edge * (1 + 2e-5), 1)):
        # Of the smaller chunks there are too many to be merged at once.
        typical = thresholds(forest, (1.0, delta))
        out = verify(**forest, typical=typical, workspace=poisoned(forest, CHUNK if sampled else CHUNK // 2))
        assert out.lengths.tolist() == [length]
        assert torch.equal(out.packed, reference.verify(**forest, typical=typical).packed)


def test_of_equally_long_typical_paths_the_likeliest_wins():
    forest = {
        "logits": torch.tensor([[1.0, 1.5, 1.25, 0.0]]).repeat(4, 1),
        "tokens": torch.tensor([0, 0, 1, 2], dtype=torch.int32),
        "parents": torch.tensor([-1, 0, 0, 0], dtype=torch.int32),
        "first_rows": torch.tensor([0, 4], dtype=torch.int32),
        "depth": 2,
    }
    forest["typical"] = thresholds(forest, TypicalAcceptance())
    assert_equals_reference(forest)
    assert reference.verify(**forest).rows.tolist() == [[2, -1, -1]]


def test_a_long_vocabulary_and_rows_far_apart(monkeypatch):
    """Chunks of the real size, a row stride that is not the vocabulary, and no workspace of our own."""
    monkeypatch.setattr("medusa_apar.triton_kernels.verify._NOISE_BLOCK", 512)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9000, generator=generator)[:, :8999]
    forest = {
        "logits": logits,
        "tokens": torch.tensor([4, int(logits[0].argmax()), 6], dtype=torch.int32),
        "parents": torch.tensor([-1, 0, -1], dtype=torch.int32),
        "first_rows": torch.tensor([0, 2, 3], dtype=torch.int32),
        "depth": 1,
    }
    noise = Noise(*(torch.tensor(ids) for ids in ([1, 2], [3, -4], [5, 6, 7])), torch.tensor([1, 0]).int())
    for extra in ({}, {"noise": noise}, {"typical": thresholds(forest, TypicalAcceptance(), None)}):
        out = verify(**forest, **extra)
        assert torch.equal(out.packed, reference.verify(**forest, **extra).packed)
    assert out.lengths.tolist()[1] == 1


def test_more_chunks_than_are_merged_at_once():
    logits = torch.randn(2, 1030, generator=torch.Generator().manual_seed(1))
    logits[0, 1029], logits[1, 500] = 50.0, 60.0
    forest = {
        "logits": logits,
        "tokens": torch.tensor([4, 1029], dtype=torch.int32),
        "parents": torch.tensor([-1, 0], dtype=torch.int32),
        "first_rows": torch.tensor([0, 2], dtype=torch.int32),
        "depth": 1,
    }
    for extra in ({}, {"typical": thresholds(forest, TypicalAcceptance())}):
        out = verify(**forest, **extra, max_rows=128, workspace=poisoned(forest, 64))
        assert out.tokens.tolist() == [[1029, 500]] and out.rows.tolist() == [[1, -1]]
        assert torch.equal(out.packed, reference.verify(**forest, **extra).packed)


@settings(deadline=None, max_examples=30)
@given(forests(max_threads=1, vocabs=(4, 30), dtypes=(torch.float32,)), st.sampled_from([(0.09, 0.3), (0.3, 1.0)]))
def test_reference_accepts_what_medusa_llm_accepts(forest, typical):
    evaluate_posterior = pytest.importorskip("medusa.model.utils").evaluate_posterior
    logits, ids, parents = forest["logits"], forest["tokens"].tolist(), forest["parents"].tolist()
    count = int(forest["first_rows"][1])
    assume(count > 0 and logits.isfinite().all() and all(0 <= token < logits.shape[1] for token in ids))
    # medusa-llm adds 1e-5 inside the entropy's logarithm: leave out what lies between the two thresholds.
    chances = logits.softmax(-1)
    limits = [
        (typical[1] * (chances * (chances + extra).log()).sum(-1).exp()).clamp(max=typical[0]) for extra in (0, 1e-5)
    ]
    for row in range(1, count):
        chance = chances[parents[row], ids[row]]
        assume(
            all((chance > limit[parents[row]] * (1 + 1e-5)) == (chance > limits[0][parents[row]]) for limit in limits)
        )
    paths = []
    for row in range(count):
        path = [row]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        paths.append(path)
    longest = max(map(len, paths))
    # Padding must not count as a guess: a row where its token is impossible.
    impossible = torch.cat([logits, torch.full((1, logits.shape[1]), -1e9)])
    impossible[-1, 1] = 0.0
    candidates = torch.tensor([[ids[row] for row in path] + [0] * (longest - len(path)) for path in paths])
    padded = torch.stack([impossible[path[:-1] + [-1] * (longest - len(path) + 1)] for path in paths])
    best, length = evaluate_posterior(padded, candidates, 1.0, *typical)
    options = {"tokens": forest["tokens"], "parents": forest["parents"], "first_rows": forest["first_rows"]}
    out = reference.verify(logits, **options, depth=8, typical=torch.tensor([typical]))
    expected = paths[int(best)][: int(length) + 1]
    assert [0, *out.rows[0].tolist()][: int(out.lengths[0])] == expected
    assert int(out.tokens[0, int(length)]) == int(logits[expected[-1]].argmax())
