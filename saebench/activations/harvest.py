"""harvest: run a model over a text once and write its activations at one or more hooks to a cache."""

from __future__ import annotations

import sys

from saebench.activations.cache import ActivationCache
from saebench.activations.settings import HarvestConfig
from saebench.activations.text_source import TextSource
from saebench.activations.writing import Target, write_cache
from saebench.core.settings import accepts_settings


@accepts_settings(HarvestConfig)
def harvest(config: HarvestConfig) -> ActivationCache:
    """Run ``config.model`` over ``config.text`` and write an activation cache to ``config.out``.

    Documents are joined by the end-of-text token and packed into contexts of ``ctx`` tokens; held-out
    documents have contexts of their own. Position 0 of each context is dropped unless ``keep_first``. The
    harvest ends after ``tokens`` rows (held-out rows included) or at the end of the text. Settings are
    checked before the model is loaded where that is possible.

    With ``gradients`` the cache also has the gradient of the model's loss at each row (`Model.gradients`).
    The last position of each context predicts nothing and then has no row.

    >>> made = sb.harvest(out="made", model="demo", text="sotu", tokens=500, quiet=True)
    >>> made.n_rows, made.d_in()
    (500, 256)

    After a harvest was killed, the same call resumes it, and the result has the same bytes as without the
    interruption. If the cache is complete already, it is opened. The model computes in float32 on a CPU and
    in the stored type on a GPU (in float32 for fp16 with gradients).

    Raises:
        UserError: an unknown model, text, hook or device, contexts longer than the model reads, NaN or
            infinite activations or gradients, a full disk or GPU, or an ``out`` that holds something else.
    """
    source = TextSource(config)
    target = Target(
        out=config.out,
        shard_rows=config.shard_rows,
        quiet=config.quiet,
        total=config.tokens,
        unit="tok",
    )
    cache, made = write_cache(source, target)
    if made:
        _warn_of_shortage(config, cache)
    return cache


def _warn_of_shortage(config: HarvestConfig, cache: ActivationCache) -> None:
    if cache.n_rows < config.tokens:
        print(
            f"warning: the text ended after {cache.n_rows:,} of the {config.tokens:,} rows of --tokens",
            file=sys.stderr,
        )
    for what, count in cache.manifest.get("left_out", {}).items():
        print(f"warning: {count:,} {what.replace('_', ' ')} were left out", file=sys.stderr)
    held_out = int(cache.held_out.sum())
    if held_out in (0, cache.n_rows):
        some = "none" if held_out == 0 else "all"
        print(
            f"warning: {some} of the {cache.n_rows:,} rows are held out (about 1 document in 20 is); "
            "harvest more documents before training or evaluating on this cache",
            file=sys.stderr,
        )
