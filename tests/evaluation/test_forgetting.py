from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from metier.data.pairs import Pair, generate
from metier.errors import DataError, ModelError, RunError
from metier.evaluation.forgetting import Ability, Material, compare, load_material, measure
from metier.model.generate import Engine
from metier.model.load import Base, load_base
from metier.task import Forgetting
from metier.text.template import Renderer

SETTINGS = Forgetting()


@pytest.fixture(scope="module")
def base(stories260k) -> Base:
    return load_base(str(stories260k), dtype=torch.float32)


@pytest.fixture(scope="module")
def material(data_dir) -> Material:
    story = (data_dir / "tinystories_sample" / "tinystories.txt").read_text(encoding="utf-8")
    return Material("stories", (story[:9_000],), "pairs", tuple(generate(per_phenomenon=15)))


def measured(base: Base, material: Material, noise: float = 0.0) -> tuple[Ability, Ability]:
    model = copy.deepcopy(base.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    engine = Engine(model, Renderer(base.tokenizer, "plain"), max_new_tokens=1)
    return measure(engine.logprobs, base.tokenizer, engine.context, material)


@pytest.fixture(scope="module")
def noisy(base, material):
    """Measurements of the model with noise on its weights, as a share of their spread."""
    return cache(lambda noise: measured(base, material, noise))


@pytest.fixture(scope="module")
def before(noisy) -> tuple[Ability, Ability]:
    return noisy(0.0)


def direct_bits(base: Base, text: str) -> float:
    """Second implementation: one token after the other through the plain model."""
    ids = [base.tokenizer.bos_id, *base.tokenizer.encode(text)]
    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor([ids])).logits[0].double()
    total = 0.0
    for place in range(1, len(ids)):
        exponentials = torch.exp(logits[place - 1] - logits[place - 1].max())
        total -= math.log2(exponentials[ids[place]] / exponentials.sum())
    return total


def test_bits_per_byte_equal_a_direct_computation(base, material, before):
    text = material.texts[0]
    windows = [text[:0]]
    while sum(map(len, windows)) < len(text):  # cut again, by bytes that were counted
        start = sum(map(len, windows))
        size = before[0].sizes[len(windows) - 1]
        windows.append(text.encode()[len(text[:start].encode()) :][:size].decode())
    assert "".join(windows) == text, "every byte is scored once"
    for place in (0, 1, len(before[0].values) - 1):
        assert before[0].values[place] == pytest.approx(
            direct_bits(base, windows[place + 1]), rel=1e-4
        )
    per_byte = sum(before[0].values) / sum(before[0].sizes)
    assert 0.9 < per_byte < 1.2, "a story model on stories"


def test_minimal_pairs_equal_a_direct_computation(base, material, before):
    for place in range(0, len(material.pairs), 37):
        pair = material.pairs[place]
        good, bad = direct_bits(base, pair.good), direct_bits(base, pair.bad)
        assert before[1].values[place] == (good < bad)
    assert 0.5 < np.mean(before[1].values) < 0.8, "a tiny model knows some grammar"


def test_the_same_model_has_forgotten_nothing(base, material, before):
    text, skill = compare(before, [measured(base, material)], SETTINGS)
    assert (text.name, text.unit, text.lower_is_better) == ("text: stories", "bits per byte", True)
    assert (skill.name, skill.unit, skill.lower_is_better) == ("skill: pairs", "accuracy", False)
    for found in (text, skill):
        assert found.loss.mean == pytest.approx(0, abs=1e-6)
        assert found.holds
        assert found.before.mean == pytest.approx(found.after.mean)
    assert skill.loss.high > 0.001, "equal answers are no certainty"


def test_a_damaged_model_fails_both_ways(before, noisy):
    text, skill = compare(before, [noisy(0.4)], SETTINGS)
    assert not text.holds
    assert text.loss.low > SETTINGS.text_tolerance
    assert text.after.mean / text.before.mean - 1 == pytest.approx(text.loss.mean)
    assert not skill.holds
    assert skill.before.mean - skill.after.mean == pytest.approx(skill.loss.mean)


def test_a_tolerance_is_met_by_the_upper_bound_and_not_by_the_mean(before, noisy):
    text, skill = compare(before, [noisy(0.1)], SETTINGS)
    for found, field in ((text, "text_tolerance"), (skill, "skill_tolerance")):
        assert found.loss.low < found.loss.mean < found.loss.high
        between = (found.loss.mean + found.loss.high) / 2
        for tolerance, holds in ((between, False), (found.loss.high + 1e-9, True)):
            loose = Forgetting.model_validate({field: max(tolerance, 0)})
            again = compare(before, [noisy(0.1)], loose)
            assert again[(text, skill).index(found)].holds is holds


def test_one_bad_seed_is_enough(before, noisy):
    good, bad = noisy(0.001), noisy(0.4)
    alone = compare(before, [bad], SETTINGS)
    assert compare(before, [good, bad, good], SETTINGS) == alone
    assert all(found.holds for found in compare(before, [good], SETTINGS)), "control"


def test_measurements_of_other_material_are_refused(before):
    skill = before[1].model_copy(update={"values": before[1].values[:-1]})
    renamed = before[1].model_copy(update={"name": "skill: other"})
    windows = before[0].model_copy(update={"sizes": before[0].sizes[::-1]})
    for other in ((before[0], skill), (before[0], renamed), (windows, before[1]), before[:1]):
        with pytest.raises(RunError, match="other material"):
            compare(before, [before, other], SETTINGS)
    with pytest.raises(RunError, match="other material"):
        compare(before, [], SETTINGS)


def test_a_measurement_survives_a_file(before):
    for ability in before:
        assert Ability.model_validate_json(ability.model_dump_json()) == ability


def ability(values, sizes=(), name="text: x") -> Ability:
    return Ability(name=name, values=tuple(values), sizes=tuple(sizes))


def test_windows_of_one_size_give_students_t_interval():
    """With equal bits before, the ratio is a plain mean, whose interval scipy knows."""
    rng = np.random.default_rng(0)
    first, second = np.full(25, 100.0), rng.normal(110, 12, 25)
    (found,) = compare([ability(first, [50] * 25)], [[ability(second, [50] * 25)]], SETTINGS)
    oracle = stats.t.interval(0.95, 24, (second / 100).mean() - 1, stats.sem(second / 100))
    assert (found.loss.low, found.loss.high) == pytest.approx(oracle)
    per_byte = stats.t.interval(0.95, 24, second.mean() / 50, stats.sem(second / 50))
    assert (found.after.low, found.after.high) == pytest.approx(per_byte)


def test_the_interval_of_a_ratio_covers_as_often_as_it_says():
    """Windows of unequal size whose true loss is 3 %: 95 % of intervals hold it."""
    rng, covered, trials = np.random.default_rng(1), 0, 600
    for _ in range(trials):
        sizes = rng.integers(300, 1_000, 40)
        first = sizes * rng.normal(1.6, 0.3, 40)
        second = first * rng.normal(1.03, 0.08, 40)
        (found,) = compare([ability(first, sizes)], [[ability(second, sizes)]], SETTINGS)
        covered += found.loss.low <= 0.03 <= found.loss.high
    assert stats.binomtest(covered, trials, 0.95).pvalue > 0.001


def test_a_true_loss_at_the_tolerance_rarely_passes():
    """Control of the decision: 2.5 % at the tolerance, nearly always well below it."""
    rng, at, below, trials = np.random.default_rng(2), 0, 0, 300
    for _ in range(trials):
        first = (rng.random(1_000) < 0.7).astype(float)
        for loss in (0.03, 0.0):
            change = rng.random(1_000)
            down, up = (
                (first == 1) & (change < (0.05 + loss) / 0.7),
                (first == 0) & (change < 0.05 / 0.3),
            )
            second = np.where(down, 0.0, np.where(up, 1.0, first))
            pair = [ability(v, name="skill: x") for v in (first, second)]
            holds = compare([pair[0]], [[pair[1]]], SETTINGS)[0].holds
            at += holds and loss > 0
            below += holds and loss == 0
    assert stats.binomtest(at, trials, 0.025, "greater").pvalue > 0.001
    assert below / trials > 0.8


def test_few_pairs_prove_nothing():
    few = ability([1, 1, 0, 1], name="skill: x")
    (found,) = compare([few], [[few]], SETTINGS)
    assert found.loss.mean == 0
    assert not found.holds
    one = ability([1], name="skill: x")
    assert not compare([one], [[one]], SETTINGS)[0].holds


def test_windows_fit_the_context(base):
    dense = "".join(chr(0x4E00 + i) for i in range(12_000))  # three byte tokens a character
    seen: list[int] = []

    def logprobs(pairs):
        seen.extend(len(prompt) + len(ids) for prompt, ids in pairs)
        return [-1.0] * len(pairs)

    material = Material("dense", (dense,), "pairs", (Pair("A b.", "A c."),))
    text, _ = measure(logprobs, base.tokenizer, 128, material)
    assert max(seen) <= 128
    assert sum(text.sizes) == len(dense.encode())


def test_a_long_text_is_read_in_part_and_evenly(base):
    seen: list[str] = []

    def logprobs(pairs):
        seen.extend(base.tokenizer.decode(ids) for _, ids in pairs)
        return [-1.0] * len(pairs)

    texts = tuple(f"word{i} " * 120 for i in range(500))
    material = Material("long", texts, "pairs", (Pair("A b.", "A c."),))
    text, _ = measure(logprobs, base.tokenizer, None, material)
    assert 15_000 < sum(text.sizes) < 40_000
    numbers = sorted(int(window.split()[1].removeprefix("word")) for window in seen[:-2])
    assert (numbers[0], len(set(numbers))) == (0, 40)
    assert max(np.diff([*numbers, 499])) <= 20


def test_without_a_beginning_token_the_end_token_stands_first(base):
    tokenizer = copy.copy(base.tokenizer)
    tokenizer.bos_id = None
    starts = set()

    def logprobs(pairs):
        starts.update(tuple(prompt) for prompt, _ in pairs)
        return [-1.0] * len(pairs)

    material = Material("t", ("some words " * 900,), "pairs", (Pair("A b.", "A c."),))
    _, skill = measure(logprobs, tokenizer, 1024, material)
    assert starts == {(tokenizer.eos_id,)}
    assert skill.values == (0.5,), "a tie is half a win"


def test_too_little_text_is_refused(base):
    material = Material("t", ("short",), "pairs", ())
    with pytest.raises(DataError, match="too few for an interval"):
        measure(lambda pairs: [-1.0] * len(pairs), base.tokenizer, 512, material)


def test_a_sentence_longer_than_the_context_is_named(base):
    pair = Pair("A long sentence " * 100, "A b.")
    material = Material("t", ("some words " * 900,), "pairs", (pair,))
    with pytest.raises(DataError, match="at most 127") as caught:
        measure(lambda pairs: [-1.0] * len(pairs), base.tokenizer, 128, material)
    assert "A long sentence" in caught.value.place


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_model_that_gives_no_probability_is_an_error(base, material, value):
    with pytest.raises(ModelError, match=r"log-probability (nan|-inf)"):
        measure(lambda pairs: [value] * len(pairs), base.tokenizer, 512, material)


def test_the_default_material_is_pythons_reference_and_generated_pairs(tmp_path):
    found = load_material(SETTINGS, tmp_path / "task.yaml")
    assert sum(map(len, found.texts)) > 60_000
    assert found.pairs == tuple(generate())


def test_a_users_own_material_is_read_beside_the_task(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffGrüße", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"good": "A.", "bad": "B."}\n')
    settings = Forgetting(texts=("a.txt",), pairs=("p.jsonl",))
    found = load_material(settings, tmp_path / "task.yaml")
    assert (found.text, found.texts, found.skill) == ("a.txt", ("Grüße",), "p.jsonl")
    assert found.pairs[0].good == "A."


@pytest.mark.parametrize(
    ("content", "cause"), [(None, "cannot be read"), (b"\xff\xfe", "not UTF-8")]
)
def test_an_unreadable_text_is_refused(tmp_path: Path, content, cause):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=cause):
        load_material(Forgetting(texts=("a.txt",)), tmp_path / "task.yaml")
