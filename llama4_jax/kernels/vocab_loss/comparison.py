"""What is compared with a teacher, and how: the static choices of the loss, and the statistics it takes of a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Kind = Literal["kl", "reverse_kl", "skew_kl", "skew_reverse_kl", "jsd"]
Focus = Literal["none", "confidence", "student_entropy", "disagreement"]


@dataclass(frozen=True)
class Comparison:
    """D(p, q) of a token and the factor g of its soft weight; p is the teacher's distribution and q the student's.

    Both at temperature t: p = softmax(z_teacher / t), q = softmax(z / t). With b = `skew`:

    - kl:               KL(p || q)                                       (Hinton et al., arXiv 1503.02531)
    - reverse_kl:       KL(q || p)                                       (Gu et al., arXiv 2306.08543)
    - skew_kl:          KL(p || b p + (1-b) q)                           (Ko et al., arXiv 2402.03898)
    - skew_reverse_kl:  KL(q || b q + (1-b) p)                           (the same)
    - jsd:              b KL(p || m) + (1-b) KL(q || m), m = b p + (1-b) q   (Agarwal et al., arXiv 2306.13649)

    `focus`, in [0, 1], of the token and never of its label, at temperature 1:

    - none:             1
    - confidence:       1 - H(p) / log V
    - student_entropy:  H(q) / log V
    - disagreement:     1 - sum_v sqrt(p_v q_v), the squared Hellinger distance
    """

    kind: Kind = "kl"
    skew: float = 0.1
    temperature: float = 1.0
    focus: Focus = "none"
    measure: bool = False
    """Also take the statistics that the loss itself does not need."""


KL = Comparison()


class Dense(NamedTuple):
    """A teacher by its hidden states and its unembedding, whose columns are split like the student's."""

    hidden: Any  # [R, U]
    unembedding: Any  # [U, V]


class Stats(NamedTuple):
    """Of each token, fp32 [R], nats, at temperature 1 unless said; None where it was not asked for or cannot be known.

    Constants to autodiff. Probabilities are the student's unless said.
    """

    ce: Any
    divergence: Any = None  # D at the temperature of the loss
    focus: Any = None  # g
    kl: Any = None  # KL(teacher || student)
    reverse_kl: Any = None  # KL(student || teacher); not from sparse targets
    teacher_ce: Any = None
    teacher_entropy: Any = None
    entropy: Any = None
    confidence: Any = None  # the largest probability
    correct: Any = None  # 1 where no token is likelier than the label
    agreement: Any = None  # 1 where no token is likelier than the teacher's likeliest
    hard_norm: Any = None  # |q - y|, the size of CE's gradient in the logits
    soft_norm: Any = None  # |t^2 dD/dz|
    norm_product: Any = None  # (q - y) . t^2 dD/dz
    present: Any = None  # 1 where there is a target
