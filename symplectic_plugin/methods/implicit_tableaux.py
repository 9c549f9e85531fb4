"""Coefficients of the implicit methods, with their sources.

Weights for the midpoint of a step, which torchdiffeq's quartic interpolant takes, are published for none of the pairs:
`midpoint_weights` derives them from the order conditions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from .midpoint_weights import midpoint_weights
from .tableau import ButcherTableau

Row = Sequence[float | Fraction] | Tensor
Rows = Sequence[Row]
"""Rows of a square matrix, without their trailing zeros."""


@dataclass(frozen=True, eq=False)
class ImplicitMethod:
    """Implicit Runge-Kutta method, with the weights that an adaptive solver needs.

    Args:
        name: name of the method, that of torchdiffeq's main branch if it has the method.
        order: order of the solution.
        tableau: tableau of the method; for an additive method, of its implicit part.
        nonstiff: explicit tableau of an additive method, with the same b and c, or None.
        embedded: weights of the solution of one order less, for the error estimate, shape (s,), or None.
        midpoint: weights of the solution at the step's middle, shape (s,), or None.

    Raises:
        ValueError: if a fully implicit method's `a` is singular, or the parts' tableaux or weights do not fit together.
    """

    name: str
    order: int
    tableau: ButcherTableau
    nonstiff: ButcherTableau | None = None
    embedded: Tensor | None = None
    midpoint: Tensor | None = None

    def __post_init__(self) -> None:
        a, s = self.tableau.a, self.tableau.stages
        if not self.diagonally_implicit and bool((torch.linalg.matrix_rank(a) < s).any()):
            raise ValueError(f"ImplicitMethod {self.name}: a fully implicit method must have an invertible a")
        if self.nonstiff is not None:
            same = torch.equal(self.nonstiff.b, self.tableau.b) and torch.allclose(self.nonstiff.c, self.tableau.c)
            if not (same and self.nonstiff.explicit and self.diagonally_implicit):
                raise ValueError(
                    f"ImplicitMethod {self.name}: an additive method needs an explicit and a diagonally implicit "
                    "tableau with the same weights and times"
                )
        for weights in (self.embedded, self.midpoint):
            if weights is not None and weights.shape != (s,):
                raise ValueError(f"ImplicitMethod {self.name}: weights must have shape ({s},)")

    @property
    def diagonally_implicit(self) -> bool:
        """Tell whether `a` is lower triangular, so that the stages can be solved for one by one."""
        return not bool(self.tableau.a.triu(1).any())

    @property
    def explicit_first_stage(self) -> bool:
        """Tell whether the first slope is f at the step's start."""
        return not bool(self.tableau.a[0].any())


def lower_rows(rows: Rows) -> Tensor:
    """Build a square float64 matrix from rows without their trailing zeros."""
    a = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, row in enumerate(rows):
        a[i, : len(row)] = _float64(row)
    return a


def _float64(row: Row) -> Tensor:
    return torch.tensor([float(value) for value in row], dtype=torch.float64)


def _tableau(rows: Rows, b: Row) -> ButcherTableau:
    a = lower_rows(rows)
    c = a.sum(1)
    # A stage at an end of the step must be there to the last bit.
    c = torch.where((c - c.round()).abs() < 1e-14, c.round(), c)
    return ButcherTableau(a, _float64(b), c)


def _fixed(name: str, order: int, rows: Rows, b: Row) -> ImplicitMethod:
    return ImplicitMethod(name, order, _tableau(rows, b))


def _fixed_step_methods() -> list[ImplicitMethod]:
    """Build the methods without an error estimate, of one to three stages.

    gl4 and gl6 are Gauss's methods, radauIIA3 and radauIIA5 Radau's of type IIA (Hairer, Wanner, Solving ODEs II,
    tables IV.5.1, IV.5.2, IV.5.5, IV.5.6); sdirk2 is Alexander's (SIAM J. Numer. Anal. 14, 1977, theorem 5); trbdf2 is
    Hosea's and Shampine's (Appl. Numer. Math. 20, 1996). torchdiffeq's main branch has the same coefficients, except
    that both stages of its gl4 are at 1/2 - sqrt(3)/6, which makes its order 1 where f depends on t.
    """
    r2, r3, r6, r15 = math.sqrt(2), math.sqrt(3), math.sqrt(6), math.sqrt(15)
    g = 1 - r2 / 2
    gauss6 = [
        [5 / 36, 2 / 9 - r15 / 15, 5 / 36 - r15 / 30],
        [5 / 36 + r15 / 24, 2 / 9, 5 / 36 - r15 / 24],
        [5 / 36 + r15 / 30, 2 / 9 + r15 / 15, 5 / 36],
    ]
    radau5 = [
        [(88 - 7 * r6) / 360, (296 - 169 * r6) / 1800, (-2 + 3 * r6) / 225],
        [(296 + 169 * r6) / 1800, (88 + 7 * r6) / 360, (-2 - 3 * r6) / 225],
        [(16 - r6) / 36, (16 + r6) / 36, 1 / 9],
    ]
    return [
        _fixed("implicit_euler", 1, [[1]], [1]),
        _fixed("implicit_midpoint", 2, [[0.5]], [1]),
        _fixed("trapezoid", 2, [[], [0.5, 0.5]], [0.5, 0.5]),
        _fixed("sdirk2", 2, [[g], [1 - g, g]], [1 - g, g]),
        _fixed("trbdf2", 2, [[], [g, g], [r2 / 4, r2 / 4, g]], [r2 / 4, r2 / 4, g]),
        _fixed("gl4", 4, [[1 / 4, 1 / 4 - r3 / 6], [1 / 4 + r3 / 6, 1 / 4]], [0.5, 0.5]),
        _fixed("gl6", 6, gauss6, [5 / 18, 4 / 9, 5 / 18]),
        _fixed("radauIIA3", 3, [[5 / 12, -1 / 12], [3 / 4, 1 / 4]], [3 / 4, 1 / 4]),
        _fixed("radauIIA5", 5, radau5, radau5[-1]),
    ]


def _pair(name: str, order: int, implicit: Rows, explicit: Rows, embedded: Row) -> list[ImplicitMethod]:
    """Build the two methods of a stiffly accurate additive pair: its implicit part alone, and both parts together."""
    stiff = _tableau(implicit, implicit[-1])
    nonstiff = ButcherTableau(lower_rows(explicit), stiff.b, stiff.c)
    lower = _float64(embedded)
    # The highest order and strongest damping that the number of stages allows.
    alone = midpoint_weights([stiff], min(order, 4), 1 if order == 3 else 2)
    both = midpoint_weights([nonstiff, stiff], order - 1 if order == 3 else 3, 2)
    return [
        ImplicitMethod(name, order, stiff, None, lower, alone),
        ImplicitMethod(f"{name}_imex", order, stiff, nonstiff, lower, both),
    ]


def _rows(text: str) -> list[list[Fraction]]:
    """Parse rows of fractions, separated by semicolons."""
    return [[Fraction(value) for value in row.split()] for row in text.split(";")]


def _kencarp3() -> list[ImplicitMethod]:
    """Build ARK3(2)4L[2]SA (Kennedy, Carpenter, Appl. Numer. Math. 44, 2003, appendix C)."""
    implicit = _rows("""
        ;
        1767732205903/4055673282236 1767732205903/4055673282236;
        2746238789719/10658868560708 -640167445237/6845629431997 1767732205903/4055673282236;
        1471266399579/7840856788654 -4482444167858/7529755066697 11266239266428/11593286722821
        1767732205903/4055673282236
    """)
    explicit = _rows("""
        ;
        1767732205903/2027836641118;
        5535828885825/10492691773637 788022342437/10882634858940;
        6485989280629/16251701735622 -4246266847089/9704473918619 10755448449292/10357097424841
    """)
    embedded = _rows("""
        2756255671327/12835298489170 -10771552573575/22201958757719 9247589265047/10645013368117
        2193209047091/5459859503100
    """)
    return _pair("kencarp3", 3, implicit, explicit, embedded[0])


def _kencarp5() -> list[ImplicitMethod]:
    """Build ARK5(4)8L[2]SA_2 (Kennedy, Carpenter, Appl. Numer. Math. 136, 2019), more accurate than that of 2003."""
    implicit = _rows("""
        ;
        2/9 2/9;
        2366667076620/8822750406821 2366667076620/8822750406821 2/9;
        -257962897183/4451812247028 -257962897183/4451812247028 128530224461/14379561246022 2/9;
        -486229321650/11227943450093 -486229321650/11227943450093 -225633144460/6633558740617
        1741320951451/6824444397158 2/9;
        621307788657/4714163060173 621307788657/4714163060173 -125196015625/3866852212004 940440206406/7593089888465
        961109811699/6734810228204 2/9;
        2036305566805/6583108094622 2036305566805/6583108094622 -3039402635899/4450598839912
        -1829510709469/31102090912115 -286320471013/6931253422520 8651533662697/9642993110008 2/9;
        0 0 3517720773327/20256071687669 4569610470461/17934693873752 2819471173109/11655438449929
        3296210113763/10722700128969 -1142099968913/5710983926999 2/9
    """)
    explicit = _rows("""
        ;
        4/9;
        1/9 1183333538310/1827251437969;
        895379019517/9750411845327 477606656805/13473228687314 -112564739183/9373365219272;
        -4458043123994/13015289567637 -2500665203865/9342069639922 983347055801/8893519644487
        2185051477207/2551468980502;
        -167316361917/17121522574472 1605541814917/7619724128744 991021770328/13052792161721
        2342280609577/11279663441611 3012424348531/12792462456678;
        6680998715867/14310383562358 5029118570809/3897454228471 2415062538259/6382199904604
        -3924368632305/6964820224454 -4331110370267/15021686902756 -3944303808049/11994238218192;
        2193717860234/3570523412979 2193717860234/3570523412979 5952760925747/18750164281544
        -4412967128996/6196664114337 4151782504231/36106512998704 572599549169/6265429158920
        -457874356192/11306498036315
    """)
    embedded = _rows("""
        0 0 520639020421/8300446712847 4550235134915/17827758688493 1482366381361/6201654941325
        5551607622171/13911031047899 -5266607656330/36788968843917 1074053359553/5740751784926
    """)
    return _pair("kencarp5", 5, implicit, explicit, embedded[0])


METHODS: Mapping[str, ImplicitMethod] = {m.name: m for m in (*_fixed_step_methods(), *_kencarp3(), *_kencarp5())}
"""Implicit methods by name. Those with embedded weights are for adaptive steps, the others for given steps."""
