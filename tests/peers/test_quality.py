"""SAEs of saebench are at least as good as those of SAELens with equal data and settings."""

import pytest

from saebench.bench.quality import Contest, compare_quality
from saebench.cli.output import table
from saebench.evaluation.synthetic import SuperpositionWorld, ZipfWorld

CONTESTS = {
    "superposition": Contest(
        world=SuperpositionWorld(), d_sae=1024, k=10, tokens=400_000, batch_size=1000, test_rows=10_000
    ),
    "zipf": Contest(world=ZipfWorld(), d_sae=256, k=8, tokens=400_000, batch_size=1000, test_rows=10_000),
}


@pytest.mark.peers
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CONTESTS)
def test_saebench_is_at_least_as_good_as_saelens(name, saelens, tmp_path, capsys):
    contest = CONTESTS[name]
    pairs = compare_quality(contest, saelens, tmp_path, announce=lambda text: None)
    metrics = ("explained_variance", "mcc_hungarian", "l0")
    lines = [(side.name, f"{side.lr:g}", *map(side.shown, metrics)) for pair in pairs for side in pair]
    with capsys.disabled():
        print(f"\n\n{name}: {contest.tokens:,} rows, batches of {contest.batch_size:,}, "
              f"{contest.d_sae:,} latents, k {contest.k}, {len(contest.seeds)} seeds")  # fmt: skip
        print(table(("sae", "lr", *metrics), lines))
    for ours, theirs in pairs:
        assert ours.mean("explained_variance") >= theirs.mean("explained_variance") - 0.005, ours.name
        assert ours.mean("mcc_hungarian") >= theirs.mean("mcc_hungarian") - 0.02, ours.name
        assert ours.norm_error <= 1e-5, ours.name
