"""A teacher's distribution by a few of its entries: what is stored or sent where its hidden states cannot be.

Letters beside the house's: R rows (tokens), K entries of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax


class SparseTargets(NamedTuple):
    """The targets of R tokens (or [B, T] of them: every field's leading axes are the same), at temperature 1.

    The soft target of a token is the measure sum_k mass_k e_{id_k}, and `tail` on all other ids together. Three kinds:
    the k largest p and the rest as one bucket (`tail` > 0; biased off the k); n draws from p, each of mass 1/n, and
    the k largest p with m draws from the rest, each of mass p_rest/m (both `tail` = 0, and unbiased: the measure's
    expectation is p).
    """

    ids: jax.Array  # int32 [..., K]; -1 where an entry is unused; the first is the teacher's most likely token
    mass: jax.Array  # fp32 [..., K]; 0 where an entry is unused
    tail: jax.Array  # fp32 [...]; mass of all other ids together, as one bucket; 0 in the unbiased kinds
    lse: jax.Array  # fp32 [...], log sum exp of the teacher's logits
    entropy: jax.Array  # fp32 [...], of the teacher's whole distribution, nats
    label_logp: jax.Array  # fp32 [...], the teacher's log p of the label, nats
    present: jax.Array  # bool [...]; False where there is no target: the soft term is left out
