"""Base class of all sparse autoencoders: weights, encode, decode, loss, and the form in which they are saved.

It is also that of transcoders, which reconstruct other activations than those they read (Dunefsky et al.
2024, arXiv 2406.11944), and of crosscoders, which read and reconstruct several sites together (Lindsey et al.
2024, transformer-circuits.pub/2024/crosscoders).

Shapes: N rows, D = d_in, E = d_out (D for an SAE), M = d_sae latents. Weights are latent-major: one row per
latent.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saebench.core.codes import SparseCodes
from saebench.core.errors import UserError
from saebench.core.tensors import as_rows
from saebench.saes.files import save_sae
from saebench.saes.input_norm import normalized
from saebench.saes.spec import SaeSpec, SiteWidth
from saebench_kernels import latent_sums, normalize_rows_, sparse_decode, topk_encode

DEAD_TOKENS = 10_000_000
MIN_DEAD_STEPS = 50
INIT_ROWS = 4096


@dataclass(frozen=True)
class Batch:
    """Rows of one training step, and the progress of the training."""

    x_ND: Tensor
    """[N, D] activations, times the scale of the run."""
    gradient_ND: Tensor | None = None
    """[N, E] gradient of the model's loss at the target of the same rows, not scaled."""
    progress: float = 0.0
    """Fraction of the run's steps done before this one. Schedules are functions of it, so a resumed run
    repeats."""
    scratch: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)
    """Intermediate results of one call of ``loss`` that are used again in it."""
    target_NE: Tensor | None = None
    """[N, E] what a transcoder reconstructs, scaled; None where that is the input."""

    @property
    def y_NE(self) -> Tensor:
        """[N, E] what is reconstructed: the target, or else the input."""
        return self.x_ND if self.target_NE is None else self.target_NE

    def __getitem__(self, rows: slice) -> Batch:
        """Some of the rows, at the same progress."""
        gradient_ND = None if self.gradient_ND is None else self.gradient_ND[rows]
        target_NE = None if self.target_NE is None else self.target_NE[rows]
        return Batch(self.x_ND[rows], gradient_ND, self.progress, target_NE=target_NE)

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``."""
        gradient_ND = None if self.gradient_ND is None else self.gradient_ND.to(device)
        target_NE = None if self.target_NE is None else self.target_NE.to(device)
        return Batch(self.x_ND.to(device), gradient_ND, self.progress, target_NE=target_NE)


@dataclass(frozen=True)
class LossTerms:
    """The loss of one batch. ``total`` is minimized; the rest is reported."""

    total: Tensor
    """Scalar."""
    reconstruction: Tensor
    """Scalar: mean over rows of |y - y_hat|^2, divided by d_out (y is x for an SAE)."""
    auxiliary: Tensor
    """Scalar: the architecture's extra loss before its coefficient; 0 where it has none."""
    codes: SparseCodes
    """The codes of the batch."""
    error: Tensor
    """[N, E] y - y_hat, detached; where the loss is fused, in the type of the products."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further scalars for the metrics, by name."""


class SAE(nn.Module):
    """Base of all architectures. A subclass sets ``Spec`` and defines ``encode_rows`` and ``loss``.

    Weights are float32: ``W_enc_MD`` [d_sae, d_in], ``W_dec`` [d_sae, d_out], ``b_enc`` [d_sae], ``b_dec``
    [d_out]. An SAE subtracts b_dec from its input, and d_out is d_in. A transcoder (``spec.is_transcoder``)
    subtracts ``b_in`` [d_in], the mean of its input, which training does not change since b_enc can stand in
    for it; with ``spec.skip`` it adds W_skip (x - b_in) to what the latents write, ``W_skip`` [d_out, d_in].
    A crosscoder is an SAE of several sites side by side.
    ``compute_dtype`` is the type of large matrix products only. Everything that changes during training is a
    parameter or a buffer, so that checkpoints hold it; ``weight_names`` are those that a saved SAE has, too
    (``tokens_since_fired``, for example, is not among them).
    """

    Spec: ClassVar[type[SaeSpec]]
    uses_gradients: ClassVar[bool] = False
    """Whether training needs ``Batch.gradient_ND``."""
    inferences: ClassVar[tuple[str, ...]] = ()
    """The values of ``encode(x, inference=...)``, the default first; () for an SAE with one way to encode."""
    weight_names: ClassVar[tuple[str, ...]] = ("W_enc_MD", "W_dec", "b_enc", "b_dec")
    tied: ClassVar[bool] = False
    """Whether the decoder is also the encoder: then ``W_enc_MD`` is not a parameter but a property of the
    subclass. The same holds for ``b_enc`` where it is not among ``weight_names``."""
    projects_gradients: ClassVar[bool] = True
    """Whether the part of a decoder row's gradient along the row is removed, since normalization would undo
    it."""
    unit_norm_decoder: ClassVar[bool] = True
    """Whether decoder rows get unit norm after every training step."""
    homogeneous: ClassVar[bool] = True
    """Whether scaling the input and, by `fold_scale`, the biases scales codes and reconstruction alike."""
    permutable_latents: ClassVar[bool] = True
    """Whether permuting the latents of all weights permutes the codes, and changes no reconstruction."""
    b_in: Tensor
    """[d_in]: what a transcoder subtracts from its input; an SAE has none."""
    W_skip: nn.Parameter
    """[d_out, d_in]: the skip connection of a transcoder with ``spec.skip``."""
    tokens_since_fired: Tensor
    """[M] int64: training rows since each latent was last active."""

    def __init__(self, spec: SaeSpec, d_in: int) -> None:
        super().__init__()
        if spec.sites:
            self.require_two_dictionaries()
        self.spec = spec
        self.d_in = d_in
        self.d_out = sum(site.width for site in spec.targets) or d_in
        if spec.sites and sum(site.width for site in spec.sites) != d_in:
            raise ValueError(f"d_in is {d_in}, but the sites of the spec are {spec.sites}")
        self.compute_dtype = torch.float32
        self.dead_after = self.dead_tokens
        if not self.tied:
            self.W_enc_MD = nn.Parameter(torch.zeros(spec.d_sae, d_in))
        self.W_dec = nn.Parameter(torch.zeros(spec.d_sae, self.d_out))
        if "b_enc" in self.weight_names:
            self.b_enc = nn.Parameter(torch.zeros(spec.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        if spec.is_transcoder:
            self.register_buffer("b_in", torch.zeros(d_in))
            self.weight_names = (*self.weight_names, "b_in")  # type: ignore[misc]
        if spec.is_transcoder and spec.skip:
            self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in))
            self.weight_names = (*self.weight_names, "W_skip")  # type: ignore[misc]
        self.register_buffer("tokens_since_fired", torch.zeros(spec.d_sae, dtype=torch.int64))

    @classmethod
    def require_two_dictionaries(cls) -> None:
        """Raise a UserError if this architecture cannot be a transcoder or crosscoder."""
        if cls.tied:
            raise UserError(
                f"--sae {cls.Spec.name} has one dictionary that is encoder and decoder, so it can neither "
                "read one site and write another nor join several; train another architecture"
            )

    @property
    def d_sae(self) -> int:
        return self.spec.d_sae

    @property
    def k(self) -> int:
        return self.spec.k

    @property
    def W_enc(self) -> Tensor:
        """[d_in, d_sae], a transposed view of the latent-major weights."""
        return self.W_enc_MD.T

    @property
    def input_bias(self) -> Tensor:
        """[d_in] what is subtracted from the input: b_in of a transcoder, otherwise b_dec."""
        return self.b_in if self.spec.is_transcoder else self.b_dec

    def split(self, x: Tensor, *, of: Sequence[SiteWidth] | None = None) -> dict[str, Tensor]:
        """The parts [..., width] of each site of an input [..., d_in], by name; views, not copies.

        ``of=sae.spec.targets`` gives those of a reconstruction [..., d_out]. An SAE of one site has no parts.

        Raises:
            UserError: the last axis is not as wide as the sites together, or the SAE has one site.
        """
        sites = self.spec.sites if of is None else of
        if not sites:
            raise UserError("this SAE reads one site, so its input has no parts to split into")
        x = x if isinstance(x, Tensor) else torch.as_tensor(x)
        widths = [site.width for site in sites]
        if x.ndim == 0 or sum(widths) != x.shape[-1]:
            raise UserError(
                f"x has shape {tuple(x.shape)}; its last axis must be {sum(widths)} wide, as the sites "
                f"{', '.join(site.name for site in sites)} together"
            )
        return {site.name: part for site, part in zip(sites, torch.split(x, widths, dim=-1), strict=True)}

    @property
    def dead_tokens(self) -> int:
        """A latent that has not fired for this many tokens is dead, in trainings long enough for that."""
        return DEAD_TOKENS

    def configure_training(self, *, compute_dtype: torch.dtype, tokens: int, batch_size: int) -> None:
        """Set what depends on the training that this SAE is in; called before `initialize`.

        A latent counts as dead after ``dead_tokens`` tokens without firing, or after 10% of the training's
        ``tokens`` if that is less, but not before 50 batches.
        """
        self.compute_dtype = compute_dtype
        self.dead_after = max(min(self.dead_tokens, tokens // 10), MIN_DEAD_STEPS * batch_size)

    def trains_fused(self, n_rows: int) -> bool:
        """Whether a training step of ``n_rows`` rows uses the fused kernels of a GPU."""
        return False

    def needs_gradients(self, inference: str | None = None) -> bool:
        """Whether ``encode(x, inference=inference)`` needs ``gradient``, the model's gradient at x."""
        return False

    def changed_picks(self, codes: SparseCodes, default: SparseCodes) -> tuple[Tensor, Tensor]:
        """How many active entries of ``codes`` are not active in ``default``; and how many there are.

        Both are codes of the same rows, ``default`` those of the default inference. Two scalar int64 tensors.
        """
        (row_S, index_S, _), (default_row_S, default_index_S, _) = codes.coo(), default.coo()
        key_S, default_S = row_S * self.d_sae + index_S, default_row_S * self.d_sae + default_index_S
        return (~torch.isin(key_S, default_S)).sum(), torch.tensor(len(key_S), device=key_S.device)

    def extra_repr(self) -> str:
        return f"d_in={self.d_in}, d_sae={self.d_sae}, k={self.k}"

    # What an architecture defines -----------------------------------------------------------------

    def encode_rows(self, x_ND: Tensor) -> SparseCodes:
        """Codes of rows [N, D] at inference: the codes of a row depend on that row alone.

        An architecture with several ways to encode takes keywords here; ``encode`` passes them on.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define encode_rows")

    def loss(self, batch: Batch) -> LossTerms:
        """Loss of one training batch; changes no state."""
        raise NotImplementedError(f"{type(self).__name__} does not define loss")

    def after_step(self, batch: Batch, terms: LossTerms) -> None:
        """Update counters and running statistics after a step has been applied."""
        self.count_firing(terms.codes)

    def calibrate(self, x_ND: Tensor) -> float | None:
        """Set what inference needs, from held-out rows [N, D]; called once, at the end of training.

        Returns their mean L0 where k is a target for it that may be missed, otherwise None.
        """
        return None

    # What all architectures share
    # -------------------------------------------------------------------------------

    def encode(self, x: Tensor | Any, **how: Any) -> SparseCodes:
        """Codes of ``x`` of shape [d_in], [N, d_in] or [B, T, d_in].

        ``x`` is a tensor of any real type on any device, a numpy array or a list.

        Keywords depend on the architecture (``k``, ``tolerance``, ``inference``); see its ``encode_rows``.

        Raises:
            UserError: x is something else, or its last axis is not d_in.
        """
        x = as_rows(x, "x", width=self.d_in, device=self.W_dec.device)
        x_ND = x.reshape(-1, self.d_in)
        norm = None
        if self.spec.input_norm != "none":
            x_ND, norm = normalized(x_ND, self.spec.input_norm)
        codes = self.encode_rows(x_ND, **how)
        values_S = codes.values
        if norm is not None:  # in the units of x; see input_norm.py
            values_S = values_S * norm.scale_N1[:, 0][codes.rows()]
        leading = tuple(x.shape[:-1])
        return SparseCodes(
            codes.indices, values_S, codes.d_sae, leading, codes.k, codes.offsets, row_norm=norm
        )

    def decode(self, codes: SparseCodes | Tensor | Any, x: Tensor | Any = None) -> Tensor:
        """Reconstruction [*leading_shape, d_out] in float32.

        ``codes`` are those of ``encode``, or dense ones [..., d_sae]: a tensor, a numpy array or a list.
        ``x`` [*leading_shape, d_in], what was encoded, is needed by a transcoder with a skip connection, and
        for dense codes of an SAE that normalizes each row.

        Raises:
            UserError: codes or x are something else or of another width, or x is missing.
        """
        if isinstance(codes, SparseCodes):
            if codes.d_sae != self.d_sae:
                raise UserError(
                    f"codes are of {codes.d_sae:,} latents and this SAE has {self.d_sae:,}; decode them with "
                    "the SAE that made them"
                )
            codes = codes if codes.values.device == self.W_dec.device else codes.to(self.W_dec.device)
            leading, norm = codes.leading_shape, codes.row_norm
        else:
            codes = as_rows(codes, "codes", width=self.d_sae, device=self.W_dec.device)
            leading, norm = tuple(codes.shape[:-1]), None
        if x is not None and (self.spec.skip or self.spec.input_norm != "none"):
            x = as_rows(x, "x", width=self.d_in, device=self.W_dec.device)
            if tuple(x.shape[:-1]) != leading:
                raise UserError(
                    f"x has shape {tuple(x.shape)} and the codes are of {list(leading)} rows; give what was "
                    "encoded"
                )
        normalizes = self.spec.input_norm != "none"
        if x is None and (self.spec.skip or (normalizes and norm is None)):
            why = "normalizes each row" if normalizes else "has a skip connection"
            raise UserError(f"this {self.spec.kind} {why}: decode(codes, x) needs the encoded x")
        bias_E = torch.zeros_like(self.b_dec) if normalizes else self.b_dec
        if isinstance(codes, SparseCodes):
            y_hat_NE = sparse_decode(codes.values, codes.entries, self.W_dec, bias_E)
        else:
            y_hat_NE = codes.reshape(-1, self.d_sae) @ self.W_dec + bias_E
        if normalizes:
            norm = norm or normalized(x.reshape(-1, self.d_in), self.spec.input_norm)[1]
            y_hat_NE = y_hat_NE + norm[1] * self.b_dec + norm[0]
        y_hat = y_hat_NE.view(*leading, self.d_out)
        return y_hat + self.skipped(x) if self.spec.skip else y_hat

    def skipped(self, x: Tensor) -> Tensor:
        """W_skip (x - b_in) [..., d_out], float32: what the skip connection of a transcoder adds."""
        centered = (x.float() - self.b_in).to(self.compute_dtype)
        return (centered @ self.W_skip.to(self.compute_dtype).T).float()

    def forward(self, x: Tensor | Any) -> Tensor:
        """Reconstruction [..., d_out] from ``x`` [..., d_in], float32."""
        x = as_rows(x, "x", width=self.d_in, device=self.W_dec.device)
        return self.decode(self.encode(x), x)

    @torch.no_grad()
    def initialize(self, sample: Batch, *, seed: int) -> None:
        """Set the weights for training on activations like ``sample`` (Gao et al. 2024, section A.1).

        Random unit decoder rows, encoder tied to them, b_dec the mean of the sample, b_enc zero. The encoder
        is then scaled by the factor that minimizes the squared error of the first reconstruction; which
        latents are selected does not depend on it.
        """
        self.initialize_dictionary(sample, seed=seed)
        self.b_enc.zero_()
        probe = sample[:INIT_ROWS]
        error_NE = (probe.y_NE - self.b_dec).double()
        offset_NE = error_NE - self.loss(probe).error.double()
        energy = offset_NE.square().sum()
        if energy > 0:
            self.W_enc_MD.mul_(float((error_NE * offset_NE).sum() / energy))

    @torch.no_grad()
    def initialize_dictionary(self, sample: Batch, *, seed: int) -> None:
        """Set both dictionaries, and the biases of the input and the target to their means.

        Decoder rows are random unit vectors, and the encoder is tied to them. Those of a transcoder cannot be
        tied: its encoder has random unit rows, and each decoder row points to where the target is when the
        latent is among the k largest, sum_n z_n (y_n - mean y) over the sample's first rows (random where the
        latent is not active there).
        """
        generator = torch.Generator().manual_seed(seed)
        self.W_dec.copy_(torch.randn(self.d_sae, self.d_out, generator=generator))
        self.normalize_decoder()
        self.b_dec.copy_(sample.y_NE.double().mean(0))
        if not self.spec.is_transcoder:
            if not self.tied:
                self.W_enc_MD.copy_(self.W_dec)
            return
        self.b_in.copy_(sample.x_ND.double().mean(0))
        self.W_enc_MD.copy_(torch.randn(self.d_sae, self.d_in, generator=generator))
        normalize_rows_(self.W_enc_MD)
        probe = sample[:INIT_ROWS]
        values_NK, indices_NK = topk_encode(
            probe.x_ND - self.b_in, self.W_enc_MD, torch.zeros_like(self.tokens_since_fired.float()), self.k
        )
        codes = SparseCodes.from_topk(values_NK, indices_NK, d_sae=self.d_sae)
        means_ME = latent_sums(codes.entries.groups, codes.values, probe.y_NE - self.b_dec)
        seen_M = means_ME.square().sum(1) > 0
        self.W_dec[seen_M] = means_ME[seen_M]
        self.normalize_decoder()

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Give every decoder row unit norm."""
        normalize_rows_(self.W_dec)

    @torch.no_grad()
    def count_firing(self, codes: SparseCodes) -> None:
        """Set the counter of every latent that fired in ``codes`` to 0 and add the batch to all others."""
        self.tokens_since_fired.add_(codes.n_rows).mul_(codes.firings() == 0)

    def refresh_dead(self, *, reuse: bool = False) -> None:
        """Update what depends on the set of dead latents; called every few steps on a GPU, where it may wait.

        ``reuse`` rebuilds it from the saved state, for a training that is resumed.
        """

    def graph_key(self, progress: float) -> Hashable | None:
        """A key for the sequence of kernels of a training step, or None if the step may wait for the device.

        Steps with the same key run the same kernels on tensors of the same shapes, so a GPU can replay the
        step as a CUDA graph.
        """
        return None

    def dead_latents(self) -> Tensor:
        """Indices of the latents that have not fired for ``dead_after`` tokens, int64."""
        return (self.tokens_since_fired >= self.dead_after).nonzero()[:, 0]

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """Turn an SAE of ``scale * x`` into one of ``x``: biases and codes are divided by ``scale``.

        The activation function must be homogeneous of degree one (top-k, ReLU). W_enc and W_dec do not
        change, so decoder rows keep unit norm: z(s x) = s z'(x) with b_enc' = b_enc / s, b_dec' = b_dec / s.
        """
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)

    @torch.no_grad()
    def fold_scales(self, sites: Sequence[float], targets: Sequence[float]) -> None:
        """Turn an SAE of scaled activations into one of unscaled activations, as `fold_scale` does.

        Each of the sites, and each of the targets of a transcoder, has a scale of its own; ``targets`` is
        empty for an SAE or a crosscoder, whose targets are its sites. Codes are divided by the scale s of the
        first target (of the first site of a crosscoder), so the decoder rows of that site keep their norms,
        and those of another site of scale t are multiplied by s / t.
        """
        unit = (targets or sites)[0]
        self.fold_scale(unit)
        if len(sites) == 1 and not targets:
            return
        site_D = self.columns(sites, of=self.spec.sites)
        target_E = self.columns(targets, of=self.spec.targets) if targets else site_D
        self.W_enc_MD.mul_(site_D / unit)
        self.W_dec.mul_(unit / target_E)
        self.b_dec.mul_(unit / target_E)
        if self.spec.is_transcoder:
            self.b_in.div_(site_D)
        if self.spec.is_transcoder and self.spec.skip:
            self.W_skip.mul_(site_D).div_(target_E[:, None])

    def columns(self, values: Sequence[float], *, of: Sequence[SiteWidth]) -> Tensor:
        """[sum of widths] float32: each site's value at all of its columns."""
        widths = torch.tensor([site.width for site in of])
        columns = torch.tensor(values, dtype=torch.float64).repeat_interleave(widths)
        return columns.float().to(self.W_dec.device)

    # Disk -----------------------------------------------------------------------------------------

    def save(self, directory: Path | str, **facts: object) -> None:
        """Write ``sae.safetensors`` and then ``sae.json`` into ``directory``, each atomically.

        ``facts`` (hook_name, model, ...) are written into the JSON file beside the spec.
        """
        save_sae(self, Path(directory), facts)
