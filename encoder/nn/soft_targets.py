"""The two losses of a student against its teacher: soft targets over a large vocabulary, in pieces, and the cosine of states.

As in encoder.nn.loss, neither model's logits of all positions stand in memory at once, and the student's gradient is made
with the loss, while a piece's logits are still warm. Per position, with p = softmax(logits / T):

    loss                      T^2 sum_v p_teacher (log p_teacher - log p_student)
    d loss / d logits         T (p_student - p_teacher)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.base.batch import IGNORE, LossTerm
from encoder.base.pieces import piece_rows
from encoder.nn.heads import TokenDecoder
from encoder.nn.loss import PIECE_POSITIONS, added_product, scaled


def soft_target_sum(
    student: TokenDecoder, teacher: TokenDecoder, target_M: Tensor, *, temperature: float
) -> LossTerm:
    """T^2 KL(p_teacher || p_student), summed over positions (Hinton et al. 2015, section 2; Sanh et al. 2019, section 3).

    student, teacher: hidden [M, C], weight [V, C] and bias of each; their widths may differ. Of the larger vocabulary the
        ids that the other has not are left out: no text has them
    target_M: int64 [M]; positions with IGNORE contribute exactly zero
    temperature: T, above 0; T^2 keeps the gradients' size while T changes

    The teacher gets no gradient. Sums and logits are fp64 for fp64 weights, else fp32; matrix products run in the autocast
    dtype where autocast is on, else in the weight's own.
    """
    # words past the smaller vocabulary are in no text: they leave both softmaxes
    shared = min(len(student.weight_VC), len(teacher.weight_VC))
    student = _of_vocabulary(student, shared)
    teacher = _at_rest(_of_vocabulary(teacher, shared))
    # both in the student's dtype under autocast, else each in its own
    dtype = None
    device = student.hidden_MC.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return LossTerm(
        *_SoftTargetSum.apply(
            *student,
            teacher,
            _Question(target_M, temperature, dtype),
            torch.is_grad_enabled(),
        )
    )


def cosine_distance_sum(x_MC: Tensor, y_MC: Tensor, target_M: Tensor) -> LossTerm:
    """1 - cos(x, y), summed over positions; those with target IGNORE contribute exactly zero (Sanh et al. 2019, section 3).

    x_MC, y_MC: [M, C]; computed in fp32, fp64 where x is
    target_M: int64 [M]
    """
    exact = torch.promote_types(x_MC.dtype, torch.float32)
    counts_M = target_M != IGNORE
    with torch.autocast(x_MC.device.type, enabled=False):
        cosine_M = F.cosine_similarity(x_MC.to(exact), y_MC.detach().to(exact), dim=1)
    total = (1.0 - cosine_M).where(counts_M, 0.0).sum()
    return LossTerm(total, total.detach(), counts_M.sum(), torch.zeros_like(counts_M.sum()))


def _of_vocabulary(decoder: TokenDecoder, words: int) -> TokenDecoder:
    if len(decoder.weight_VC) == words:
        return decoder
    bias_V = None if decoder.bias_V is None else decoder.bias_V[:words]
    return TokenDecoder(decoder.hidden_MC, decoder.weight_VC[:words], bias_V)


def _at_rest(decoder: TokenDecoder) -> TokenDecoder:
    bias_V = None if decoder.bias_V is None else decoder.bias_V.detach()
    return TokenDecoder(decoder.hidden_MC.detach(), decoder.weight_VC.detach(), bias_V)


class _Question(NamedTuple):
    """What both models are compared at."""

    target_M: Tensor
    temperature: float
    dtype: torch.dtype | None  # of the matrix products; None: the weight's


class _SoftTargetSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_MC: Tensor,
        weight_VC: Tensor,
        bias_V: Tensor | None,
        teacher: TokenDecoder,
        question: _Question,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        target_M, temperature, dtype = question
        exact = torch.promote_types(weight_VC.dtype, torch.float32)
        piece = PIECE_POSITIONS[h_MC.device.type]
        total = torch.zeros((), dtype=exact, device=h_MC.device)
        with torch.autocast(h_MC.device.type, enabled=False):
            own = _Product(TokenDecoder(h_MC, weight_VC, bias_V), dtype, exact)
            theirs = _Product(teacher, dtype, exact)
            d_weight = d_bias = None
            if with_gradients:
                # d_h is written once; the others are summed over pieces, so in fp32 or fp64
                d_h = torch.empty_like(h_MC)
                if own.bias_V is not None:
                    d_bias = torch.zeros_like(own.bias_V)
            for start in range(0, len(target_M), piece):
                part = slice(start, start + piece)
                logits_mV = own.logits(part)
                teacher_mV = theirs.logits(part)
                total += turn_into_gradient_(
                    logits_mV,
                    teacher_mV,
                    target_M[part],
                    biases=(own.bias_V, theirs.bias_V),
                    d_bias_V=d_bias,
                    temperature=temperature,
                ).sum()
                if with_gradients:  # in the place of the logits stands their gradient
                    d_h[part] = logits_mV @ own.weight_VC
                    d_weight = added_product(d_weight, logits_mV.T, own.h_MC[part], dtype=exact)
                # or they stand beside the next piece's
                del logits_mV, teacher_mV
        if with_gradients:
            if bias_V is not None and d_bias is not None:
                d_bias = d_bias.to(bias_V.dtype)
            if d_weight is None:  # no positions
                d_weight = torch.zeros_like(weight_VC)
            ctx.save_for_backward(d_h, d_weight.to(weight_VC.dtype), d_bias)
        count = (target_M != IGNORE).sum()
        correct = torch.zeros_like(count)
        # two outputs of one value: the first is differentiated, the other only reported
        reported = total.clone()
        ctx.mark_non_differentiable(reported, count, correct)
        return total, reported, count, correct

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_h, d_weight, d_bias = ctx.saved_tensors
        if d_bias is not None:
            d_bias = scaled(d_bias, d_total)
        return scaled(d_h, d_total), scaled(d_weight, d_total), d_bias, None, None, None


class _Product:
    """A decoder whose logits are computed a few positions at a time."""

    def __init__(
        self, decoder: TokenDecoder, dtype: torch.dtype | None, exact: torch.dtype
    ) -> None:
        dtype = dtype or decoder.weight_VC.dtype
        self.h_MC = decoder.hidden_MC.to(dtype)
        self.weight_VC = decoder.weight_VC.to(dtype)
        self.bias_V = None if decoder.bias_V is None else decoder.bias_V.to(exact)

    def logits(self, part: slice) -> Tensor:
        """[m, V], without the bias."""
        return self.h_MC[part] @ self.weight_VC.T


def turn_into_gradient_(
    logits_mV: Tensor,
    teacher_mV: Tensor,
    target_m: Tensor,
    *,
    biases: tuple[Tensor | None, Tensor | None],
    d_bias_V: Tensor | None,
    temperature: float,
) -> Tensor:
    """The student's logits become T (p_student - p_teacher), the teacher's are used up; returns the losses [m].

    logits_mV, teacher_mV: of fp64, else computed in fp32 a few positions at a time, which stay in a CPU's cache
    target_m: int64; where it is IGNORE loss and gradient are zero
    biases: the student's and the teacher's, added to their logits first
    d_bias_V: has the gradient's sum over positions added
    temperature: T
    """
    exact = torch.promote_types(logits_mV.dtype, torch.float32)
    loss_m = torch.empty(len(target_m), dtype=exact, device=logits_mV.device)
    # both models' logits of a position are worked on at once: twice the vocabulary
    rows = piece_rows(logits_mV, elements=2 * logits_mV.shape[1])
    for start in range(0, len(target_m), rows):
        part = slice(start, start + rows)
        counts_r1 = (target_m[part] != IGNORE)[:, None]
        log_student_rV = _log_softmax(logits_mV[part].to(exact), biases[0], temperature)
        log_teacher_rV = _log_softmax(teacher_mV[part].to(exact), biases[1], temperature)
        teacher_rV = log_teacher_rV.exp()

        # sum_v p_teacher (log p_teacher - log p_student); log_teacher is used up
        summands_rV = log_teacher_rV.sub_(log_student_rV).mul_(teacher_rV)
        loss_m[part] = summands_rV.sum(1).mul_(temperature**2).where(counts_r1[:, 0], 0)

        # T (p_student - p_teacher), zero where the target is IGNORE; log_student is used up
        gradient_rV = log_student_rV.exp_().sub_(teacher_rV).mul_(counts_r1 * temperature)
        if d_bias_V is not None:
            d_bias_V += gradient_rV.sum(0)
        logits_mV[part] = gradient_rV
    return loss_m


def _log_softmax(logits_rV: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    """log softmax((logits + bias) / T), in place."""
    if bias_V is not None:
        logits_rV.add_(bias_V)
    logits_rV.div_(temperature)
    return logits_rV.sub_(logits_rV.logsumexp(1, keepdim=True))
