"""Backward rules as data: what takes the place of a derivative where two runs are known, so that effects add up.

"secant": each step's slope *between the two runs* (DeepLIFT's rescale rule, Shrikumar et al. 2017, carried to products, norms
and attention). Every rule is exact for its step, so the whole is: (source − base) times this gradient, summed over any cut
through the model, is the change of the metric. "relp": the rules of Relevance Patching (Jafari et al. 2025): scales of norms and
attention patterns held, activations by y/x, half of a product to each factor. "gradient": the derivative, which needs no rule.

A rule gets the call of one step and gives its output, unchanged, the tensors that gradients go to, and how they are made of the
output's gradient; all in base rows alone. Which rule a step takes is found by what a model calls (`interp.engine.ruled`).
Standard library and torch only: this travels to a remote server by source.
"""

from __future__ import annotations

from .softmax_rules import attention, log_softmax, logsumexp, softmax
from .step_rules import (
    INVERSE_ROOT,
    MATRIX,
    Rule,
    added_product,
    closed,
    elementwise,
    held,
    norm,
    power,
    product,
    quotient,
    ratio_slope,
    secant_slope,
)

#: All names stand without underscores at their ends, in place or as an operator.
#: Steps that are linear whatever goes in: they keep their derivative.
LINEAR = frozenset(
    """
    requires_grad view view_as reshape flatten unflatten transpose permute movedim swapaxes t get contiguous clone to
    type type_as float double half bfloat16 cat stack concat split chunk unbind getitem select narrow index_select
    squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave roll flip add radd iadd sub rsub isub neg
    mean sum cumsum dropout where masked_fill masked_select pad tril triu copy setitem index_add scatter scatter_add
    index_copy retain_grad register_hook tile diff
    """.split()  # noqa: SIM905
)
#: Steps that are linear in one input: they keep their derivative where nothing else of what they get depends on the prompt.
BILINEAR = frozenset(
    """
    mul multiply rmul matmul bmm linear addmm baddbmm conv1d einsum grouped_mm imul
    """.split()  # noqa: SIM905
)
QUOTIENTS = frozenset(
    """
    div divide true_divide truediv itruediv idiv
    """.split()  # noqa: SIM905
)
#: Functions of single numbers.
CURVES = """
    relu relu6 leaky_relu elu celu selu silu gelu mish softplus hardswish hardsigmoid sigmoid tanh exp expm1 log log1p
    sin cos erf clamp clip abs square sign hardtanh logsigmoid softsign tanhshrink threshold clamp_min clamp_max
""".split()  # noqa: SIM905
SECANT = elementwise(secant_slope)
RATIO = elementwise(ratio_slope)
#: The rules of each method, by the name of what is called.
RULES: dict[str, dict[str, Rule]] = {
    "gradient": {},
    "secant": {
        **dict.fromkeys(CURVES, SECANT),
        "pow": power(SECANT),
        "square": closed(lambda x, end, y, y_end: x + end),
        "rsqrt": INVERSE_ROOT,
        "sqrt": closed(lambda x, end, y, y_end: 1 / (y + y_end)),
        **dict.fromkeys(("reciprocal", "rdiv", "rtruediv"), closed(lambda x, end, y, y_end: -y * y_end)),
        **dict.fromkeys(("mul", "multiply", *MATRIX), product(1.0, True)),
        **dict.fromkeys(("addmm", "baddbmm"), added_product(1.0, True)),
        **dict.fromkeys(QUOTIENTS, quotient(True)),
        "softmax": softmax(True),
        "log_softmax": log_softmax,
        "logsumexp": logsumexp,
        **dict.fromkeys(("layer_norm", "rms_norm"), norm(True)),
        "scaled_dot_product_attention": attention(True),
        **dict.fromkeys(("max", "amax"), held),  # what a softmax is shifted by, which is no part of its derivative
    },
    "relp": {
        **dict.fromkeys(CURVES, RATIO),
        "pow": power(RATIO),
        **dict.fromkeys(("rsqrt", "sqrt", "reciprocal", "rdiv", "rtruediv", "max", "amax"), held),
        **dict.fromkeys(("mul", "multiply", *MATRIX), product(0.5, False)),
        **dict.fromkeys(("addmm", "baddbmm"), added_product(0.5, False)),
        **dict.fromkeys(QUOTIENTS, quotient(False)),
        "softmax": softmax(False),
        **dict.fromkeys(("layer_norm", "rms_norm"), norm(False)),
        "scaled_dot_product_attention": attention(False),
    },
}
#: The same with attention patterns held at the base run's, so that only values pass through attention.
RULES["secant held"] = {
    **RULES["secant"],
    "softmax": softmax(False),
    "scaled_dot_product_attention": attention(False),
}
