"""Preference losses: small frozen dataclasses from sequence log-probs to one loss per pair.

They know of no model, and they do not reduce.

Names, per pair (all in nats): `p_w, p_l` policy and `r_w, r_l` reference log-probs of chosen and rejected,
summed over the scored tokens; `n_w, n_l` how many tokens that is; `a = p_w - r_w`, `b = p_l - r_l`;
`Δ = s_w - s_l`, with scores `s_w = a`, `s_l = b` unless a divergence says otherwise.
"""

from dpo_wrapper.losses.base import Loss as Loss
from dpo_wrapper.losses.base import Objective as Objective
from dpo_wrapper.losses.base import PairLogProbs as PairLogProbs
from dpo_wrapper.losses.base import PromptedLogProbs as PromptedLogProbs
from dpo_wrapper.losses.base import RunningGap as RunningGap
from dpo_wrapper.losses.base import is_number as is_number
from dpo_wrapper.losses.base import option as option
from dpo_wrapper.losses.batchwise import AOT as AOT
from dpo_wrapper.losses.batchwise import AOTUnpaired as AOTUnpaired
from dpo_wrapper.losses.batchwise import BetaDPO as BetaDPO
from dpo_wrapper.losses.batchwise import updated as updated
from dpo_wrapper.losses.combine import PairFunction as PairFunction
from dpo_wrapper.losses.combine import WeightedLosses as WeightedLosses
from dpo_wrapper.losses.combine import check_columns as check_columns
from dpo_wrapper.losses.combine import combined as combined
from dpo_wrapper.losses.combine import needs_reference as needs_reference
from dpo_wrapper.losses.combine import unit_of as unit_of
from dpo_wrapper.losses.combine import weighted as weighted
from dpo_wrapper.losses.divergences import AlphaDivergence as AlphaDivergence
from dpo_wrapper.losses.divergences import Divergence as Divergence
from dpo_wrapper.losses.divergences import ForwardKL as ForwardKL
from dpo_wrapper.losses.divergences import JensenShannon as JensenShannon
from dpo_wrapper.losses.divergences import ReverseKL as ReverseKL
from dpo_wrapper.losses.functional import dpo_loss as dpo_loss
from dpo_wrapper.losses.listwise import KTO as KTO
from dpo_wrapper.losses.listwise import PlackettLuce as PlackettLuce
from dpo_wrapper.losses.listwise import RankedLogProbs as RankedLogProbs
from dpo_wrapper.losses.listwise import UnpairedLogProbs as UnpairedLogProbs
from dpo_wrapper.losses.pairwise import DPOP as DPOP
from dpo_wrapper.losses.pairwise import EXO as EXO
from dpo_wrapper.losses.pairwise import IPO as IPO
from dpo_wrapper.losses.pairwise import DiscoPOP as DiscoPOP
from dpo_wrapper.losses.pairwise import Hinge as Hinge
from dpo_wrapper.losses.pairwise import Robust as Robust
from dpo_wrapper.losses.pairwise import Sigmoid as Sigmoid
from dpo_wrapper.losses.pairwise import SigmoidNorm as SigmoidNorm
from dpo_wrapper.losses.pointwise import BCO as BCO
from dpo_wrapper.losses.pointwise import NCA as NCA
from dpo_wrapper.losses.pointwise import SPPO as SPPO
from dpo_wrapper.losses.pointwise import APODown as APODown
from dpo_wrapper.losses.pointwise import APOZero as APOZero
from dpo_wrapper.losses.reference_free import CPO as CPO
from dpo_wrapper.losses.reference_free import ORPO as ORPO
from dpo_wrapper.losses.reference_free import SFT as SFT
from dpo_wrapper.losses.reference_free import AlphaPO as AlphaPO
from dpo_wrapper.losses.reference_free import ReferenceFree as ReferenceFree
from dpo_wrapper.losses.reference_free import SimPO as SimPO
from dpo_wrapper.losses.registry import losses_by_name as losses_by_name
from dpo_wrapper.losses.registry import parse_losses as parse_losses
