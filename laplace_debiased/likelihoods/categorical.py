"""The categorical likelihood: one label per sample, or one per position of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_debiased.likelihoods.losses import LossModel


@dataclass(frozen=True)
class SoftmaxCrossEntropy(LossModel):
    """Categorical likelihood with logits f: ℓ = −log softmax(f)_y, summed over positions.

    Attributes:
        ignore_index: label that does not count: no loss and no curvature; None for no such label.
        positions: whether outputs may also be [m, T, C], with targets [m, T]: the labels of a
            sequence are independent given its input. A sample is then a whole sequence.
        allow_probabilities: whether outputs that all sum to one are taken for logits.
    """

    ignore_index: int | None = None
    positions: bool = False
    allow_probabilities: bool = True

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim != 2 and not (self.positions and outputs.ndim == 3):
            allowed = " or (batch, positions, classes)" if self.positions else ""
            raise ValueError(
                f"classification needs model outputs of shape (batch, classes){allowed}; got "
                f"{tuple(outputs.shape)}."
            )
        n_classes = outputs.shape[-1]
        if n_classes < 2:
            raise ValueError(
                "classification needs at least 2 classes (logits); the model returned "
                f"{n_classes} output. For a single logit use likelihood='bernoulli'."
            )
        wanted = "(batch,)" if outputs.ndim == 2 else "(batch, positions)"
        if (
            targets.ndim != outputs.ndim - 1
            or targets.is_floating_point()
            or targets.is_complex()
            or targets.dtype is torch.bool
        ):
            raise ValueError(
                f"classification needs integer class indices of shape {wanted}; got targets of "
                f"shape {tuple(targets.shape)} and dtype {targets.dtype}. Convert one-hot labels "
                "with `labels.argmax(-1)`."
            )
        if targets.shape != outputs.shape[:-1]:
            got, given = (
                [str(len(t)) for t in (outputs, targets)]
                if targets.ndim == 1
                else [str(tuple(s)) for s in (outputs.shape[:-1], targets.shape)]
            )
            raise ValueError(f"{got} model outputs for {given} targets.")
        self._check_marker(targets)
        self._check_range(targets, n_classes)

    def _check_marker(self, targets: Tensor) -> None:
        unsigned = not targets.dtype.is_signed
        if unsigned and self.ignore_index is not None and self.ignore_index < 0:
            raise ValueError(
                f"targets of dtype {targets.dtype} hold no negative number, so that none of them "
                f"equals ignore_index={self.ignore_index}. Convert them with `labels.long()` "
                "before that value is written, or pass the value that marks them."
            )

    def _check_range(self, targets: Tensor, n_classes: int) -> None:
        labels = targets.long()[self._counted(targets)]
        if not labels.numel():
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= n_classes:
            hint = ""
            if low < 0 and self.ignore_index is None:
                hint = f" If {low} marks labels that do not count, pass ignore_index={low}."
            raise ValueError(
                f"targets must be class indices in 0..{n_classes - 1}; got values from {low} to "
                f"{high}.{hint}"
            )

    def n_labels(self, targets: Tensor) -> Tensor:
        return _per_sample(self._counted(targets).double())

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        counted = self._counted(targets)
        log_p = torch.log_softmax(outputs, dim=-1)
        chosen = log_p.gather(-1, _indices(targets, counted).unsqueeze(-1)).squeeze(-1)
        return -_per_sample(torch.where(counted, chosen, torch.zeros_like(chosen)))

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """Of C − 1 columns: the rank. It saves a backward pass over diag(√p) − p √pᵀ."""
        return super().hessian_root(outputs)[..., :-1]

    def root_product(self, outputs: Tensor, z: Tensor) -> Tensor:
        r"""S z [..., C, n] of z [..., C, n], whose last entries are not read; by running sums.

        S [..., C, C−1] is the Cholesky factor of diag(p) − p pᵀ in closed form: with tail sums
        q_j = Σ_{k>j} p_k (and q_{−1} = 1), column j is √(p_j q_j / q_{j−1}) at row j and
        −p_i √(p_j / (q_{j−1} q_j)) at rows i > j. Tail sums are summed from the end, so that no
        digit is lost to a dominating class.
        """
        p = torch.softmax(outputs, dim=-1)
        tails = p.flip(-1).cumsum(-1).flip(-1)  # tails[j] = Σ_{k≥j} p_k
        before, after = tails[..., :-1], tails[..., 1:]
        tiny = torch.finfo(p.dtype).tiny
        head = (p[..., :-1] / before.clamp_min(tiny)).sqrt()
        diagonal, below = head * after.sqrt(), -head / after.clamp_min(tiny).sqrt()
        z = z[..., :-1, :]
        # In place where it can be: of many classes these are large.
        found = (below.unsqueeze(-1) * z).cumsum_(-2) * p[..., 1:].unsqueeze(-1)
        found = torch.nn.functional.pad(found, (0, 0, 1, 0))
        found[..., :-1, :] += diagonal.unsqueeze(-1) * z
        return found

    def hessian_trace(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        """1 − Σ_c p_c² [m], summed over the positions that count (all, without ``targets``)."""
        p = torch.softmax(outputs, dim=-1)
        traces = (p * (1.0 - p)).sum(-1)
        if targets is not None:
            traces = traces * self._counted(targets)
        return _per_sample(traces)

    def output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        counted = self._counted(targets)
        p = torch.softmax(outputs, dim=-1)
        labels = _indices(targets, counted)
        gradient = p - torch.nn.functional.one_hot(labels, p.shape[-1]).to(p.dtype)
        return gradient * counted.unsqueeze(-1)

    def label_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.rand((*shape[:-2], shape[-1]), generator=generator, dtype=torch.float64)

    def sampled_output_gradients(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """P − onehot(ŷ) [..., C, draws] with ŷ ~ softmax(f), by inversion of its distribution."""
        p = torch.softmax(outputs, dim=-1)
        cumulative = p.detach().double().cumsum(-1)
        labels = torch.searchsorted(cumulative, noise.to(p.device) * cumulative[..., -1:])
        onehot = torch.nn.functional.one_hot(labels.clamp_max(p.shape[-1] - 1), p.shape[-1])
        return p.unsqueeze(-1) - onehot.to(p.dtype).transpose(-1, -2)

    def label_mask(self, targets: Tensor) -> Tensor | None:
        counted = self._counted(targets)
        return None if bool(counted.all()) else counted

    def _counted(self, targets: Tensor) -> Tensor:
        if self.ignore_index is None:
            return torch.ones_like(targets, dtype=torch.bool)
        return targets.long() != self.ignore_index


@dataclass(frozen=True)
class BradleyTerry(SoftmaxCrossEntropy):
    """Which of two is preferred: softmax over the pair's rewards f [m, 2]."""

    def check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim != 2 or outputs.shape[1] != 2:
            raise ValueError(
                "reward_modeling is fitted on pairs: for inputs (batch, 2, ...) the model must "
                f"return the two rewards (batch, 2); got {tuple(outputs.shape)}."
            )
        super().check_targets(outputs, targets)


def _indices(targets: Tensor, counted: Tensor) -> Tensor:
    """Class indices in int64, which torch's lookups need; 0 where a label does not count."""
    return targets.long().masked_fill(~counted, 0)


def _per_sample(values: Tensor) -> Tensor:
    """Sum over positions, if there are any."""
    return values if values.ndim == 1 else values.sum(-1)
