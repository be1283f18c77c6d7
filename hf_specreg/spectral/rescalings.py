"""Exponents of c by which weights can be multiplied together: the solutions of linear equations."""

from collections.abc import Iterable

from torch import nn

Variable = tuple[str, ...]  # an exponent: what it is of, and its name
Form = dict[Variable, float]  # a sum of exponents, each times a factor


class Rescalings:
    """Linear equations in exponents, of which some must not be negative.

    Args:
        counted: the exponents that must not be, of which as many as can be are to be positive.
    """

    def __init__(self, counted: Iterable[Variable] = ()):
        self._counted = tuple(counted)
        self._equations: dict[tuple, tuple[Form, nn.Module | None]] = {}

    def vanish(self, form: Form, *, while_fixed: nn.Module | None = None) -> None:
        """Require a form to be 0; of a batch norm that is given, while it is in evaluation mode."""
        if form:
            self._equations[tuple(sorted(form.items())), while_fixed] = form, while_fixed

    def equate(self, one: Form, other: Form) -> None:
        """Require two forms to be equal."""
        if one is not other:
            self.vanish(plus(one, other, factor=-1))

    def solution(self) -> Form:
        """Return the exponents of a solution in which all are positive, of those that count, that
        are in any: max sum of t over t <= d, 0 <= t <= 1.
        """
        from scipy.optimize import linprog  # takes a while, and is not always asked for
        from scipy.sparse import coo_array, eye_array, hstack

        forms = [
            form for form, norm in self._equations.values() if norm is None or not norm.training
        ]
        others = dict.fromkeys(v for form in forms for v in form if v not in set(self._counted))
        variables = (*self._counted, *others)
        counted, count = len(self._counted), len(variables)
        if not counted:
            return {}
        column = {variable: place for place, variable in enumerate(variables)}
        entries = [(f, r, column[v]) for r, form in enumerate(forms) for v, f in form.items()]
        factors, rows, columns = zip(*entries, strict=True) if entries else ((), (), ())
        shape = len(forms), count + counted
        found = linprog(
            [0.0] * count + [-1.0] * counted,
            A_ub=hstack([-eye_array(counted, count), eye_array(counted)]),
            b_ub=[0.0] * counted,
            A_eq=coo_array((factors, (rows, columns)), shape=shape) if forms else None,
            b_eq=[0.0] * len(forms) if forms else None,
            bounds=[(0, None)] * counted + [(None, None)] * len(others) + [(0, 1)] * counted,
        )
        is_zero = 1e-6
        return {v: d for v, d in zip(variables, found.x, strict=False) if abs(d) > is_zero}


def plus(*forms: Form, factor: float = 1) -> Form:
    """Return the sum of forms, of which all but the first are multiplied by a factor."""
    total: Form = {}
    for place, form in enumerate(forms):
        for variable, value in form.items():
            total[variable] = total.get(variable, 0) + value * (factor if place else 1)
    return {variable: value for variable, value in total.items() if value}
