r"""Derivatives of other people's networks in forward mode, and cheaper rules where a layer's weights are constants.

Torch gives every operand that has no tangent one of zeros. A convolution or a linear layer then multiplies its input
with a weight of zeros beside the product that matters, three products where two would do, and a sum or product with a
constant looks up shapes at a price above its own. Under :class:`TangentRules` the constants stay constants:

.. math:: (x, \dot x) \mapsto (W x + b,\; W \dot x), \qquad (x, \dot x) \mapsto (c\,x,\; c\,\dot x),

and normalisations take their tangent from the statistics that the forward pass has found. Where tangents are to be
differentiated again, torch's rules of layer and instance normalisation give wrong gradients and that of softmax an
error; those here give right ones, and ``y *= y`` the right tangent. Everything else, and every operation in which a
second operand has a tangent too, goes by torch's own rules. Values are those of torch bit for bit, but of attention
with gradients; tangents up to rounding.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_ONE_AT_A_TIME = threading.RLock()
"""Torch has one level of forward mode for the whole process: a second thread would end the first one's."""

REMEDY = (
    "Differences of its answers work with any network: give estimator=Hutchinson(mode='finite') and "
    "reference=Reference(mode='finite') to F2D2Module or F2D2Callback, and mode='finite' to the Lagrangian, Eulerian "
    "and Consistency objectives; mode='reverse' is exact, where the network can be differentiated backwards"
)

_SIGNS = ("forward AD", "forward mode", "forward-mode", "jvp")
"""What torch's messages say where an operation has no rule."""


class DerivativeError(ValueError):
    """A network has no derivative in the mode that was asked for."""


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """A block in which dual numbers pass through a network; one thread at a time, the others wait.

    Fused attention has no rule for tangents: within the block it takes torch's plain kernel, also in
    ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``. Where an operation has no rule all the same, a
    :class:`DerivativeError` names the submodule that it is in.
    """
    with _ONE_AT_A_TIME, contextlib.ExitStack() as after, sdpa_kernel(SDPBackend.MATH):
        after.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with forward_ad.dual_level(), TangentRules():
                yield
        except (NotImplementedError, RuntimeError) as error:
            if not any(sign in str(error) for sign in _SIGNS):
                raise
            root, name = raised_in(error) or (None, "")
            place = (
                "the velocity" if root is None else named(root, name) + (f" of {type(root).__name__}" if name else "")
            )
            raise DerivativeError(
                f"{place} has no derivative in forward mode ({str(error).splitlines()[0][:160]}). {REMEDY}"
            ) from error


def raised_in(error: BaseException, root: nn.Module | None = None) -> tuple[nn.Module, str] | None:
    """Innermost submodule of ``root`` that an error, or one that it came from, passed through, and its name there.

    ``root`` is by default the outermost module that is not of this package; ``None`` if none was running.
    """
    found: str | None = None
    link: BaseException | None = error
    own = "" if root is not None else "f2d2_lightning."
    names = {} if root is None else {id(module): name for name, module in root.named_modules()}
    while link is not None:
        for frame, _ in traceback.walk_tb(link.__traceback__):
            owner = frame.f_locals.get("self")
            if root is None and isinstance(owner, nn.Module) and not type(owner).__module__.startswith(own):
                root, names = owner, {id(module): name for name, module in owner.named_modules()}
            found = names.get(id(owner), found)
        link = link.__cause__ or link.__context__
    return None if root is None or found is None else (root, found)


def named(root: nn.Module, name: str) -> str:
    """A submodule for messages: its name, if it has one, and its class."""
    kind = type(root.get_submodule(name)).__name__
    return f"{name!r} ({kind})" if name else kind


class TangentRules(TorchFunctionMode):
    """Use the rules of this module inside of the block; to be entered within ``forward_ad.dual_level``."""

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func)
        if rule is not None:
            answer = rule(func, *args, **kwargs)
            if answer is not None:
                return answer
        return func(*args, **kwargs)


def _tangent(x: Any) -> Tensor | None:
    """The tangent of a tensor of torch's own kind, if it has one."""
    return forward_ad.unpack_dual(x).tangent if type(x) is Tensor else None


def _constant(*values: Any) -> bool:
    return all(not isinstance(v, Tensor) or forward_ad.unpack_dual(v).tangent is None for v in values)


def _one_moving(left: Any, right: Any) -> tuple[Tensor, Tensor, bool] | None:
    """Value and tangent of the one of two operands that has a tangent, and whether it is the first; else ``None``."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    first, second = forward_ad.unpack_dual(left), forward_ad.unpack_dual(right)
    if second.tangent is None:
        return None if first.tangent is None or type(left) is not Tensor else (*first, True)
    return None if first.tangent is not None or type(right) is not Tensor else (*second, False)


def _affine(
    func: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **named: Any
) -> Tensor | None:
    moving = _one_moving(input, weight)
    if moving is None or not moving[2] or not _constant(bias):
        return None
    x, tangent, _ = moving
    value = func(x, weight, bias, *rest, **named)
    return forward_ad.make_dual(value, func(tangent, weight, None, *rest, **named))


def _product(func: Callable[..., Tensor], left: Any, right: Any, **named: Any) -> Tensor | None:
    moving = None if named else _one_moving(left, right)
    if moving is None:
        return None
    x, tangent, first = moving
    answers = (func(x, right), func(tangent, right)) if first else (func(left, x), func(left, tangent))
    return forward_ad.make_dual(*answers)


def _quotient(func: Callable[..., Tensor], left: Any, right: Any, **named: Any) -> Tensor | None:
    return _product(func, left, right, **named) if _constant(right) else None


def _sum(sign: int) -> Callable[..., Tensor | None]:
    """Rule of ``left + sign * right``."""

    def rule(func: Callable[..., Tensor], left: Any, right: Any, **named: Any) -> Tensor | None:
        moving = None if named else _one_moving(left, right)
        if moving is None:
            return None
        x, tangent, first = moving
        value = func(x, right) if first else func(left, x)
        if sign < 0 and not first:
            tangent = -tangent
        # a copy: were it the operand's own tangent, an operation in place on either would change both
        return forward_ad.make_dual(value, torch.empty_like(value).copy_(tangent))

    return rule


def _in_place(func: Callable[..., Tensor], left: Tensor, *others: Any, **named: Any) -> Tensor | None:
    # torch changes the tangent of what is written to before it reads that of the same tensor on the other side
    given = (*others, *named.values())
    if not any(isinstance(other, Tensor) and other.data_ptr() == left.data_ptr() for other in given):
        return None
    copies = [other.clone() if isinstance(other, Tensor) else other for other in given]
    return func(left, *copies[: len(others)], **dict(zip(named, copies[len(others) :])))


def _own_tangent(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Tangent of what is normalised; ``None`` where torch's rule must be used.

    Its own statistics are not differentiable, and autocast casts them.
    """
    if not _constant(weight, bias) or torch.is_grad_enabled() or torch.is_autocast_enabled(input.device.type):
        return None
    return _tangent(input)


def _group_norm(
    func: Callable[..., Tensor],
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
    **named: Any,
) -> Tensor | None:
    tangent = _own_tangent(input, weight, bias)
    if tangent is None:
        return None
    x = forward_ad.unpack_dual(input).primal
    batch, channels = x.shape[:2]
    size = x[0, 0].numel()
    value, mean, inverse = torch.native_group_norm(x.contiguous(), weight, bias, batch, channels, size, num_groups, eps)
    groups = (batch, num_groups, -1)
    moved = _normalized_tangent(x.reshape(groups), tangent.reshape(groups), mean[..., None], inverse[..., None])
    moved = moved.reshape(x.shape)
    if weight is not None:
        moved = moved * weight.reshape(-1, *(1,) * (x.ndim - 2))
    return forward_ad.make_dual(value, moved)


def _instance_norm(func: Callable[..., Tensor], input: Tensor, *rest: Any, **named: Any) -> Tensor | None:
    names = ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    given = {"use_input_stats": True, "eps": 1e-5} | dict(zip(names, rest)) | named
    if _tangent(input) is None or not given["use_input_stats"]:
        return None
    # groups of one channel; the rule of instances holds their statistics constant, as that of layers does
    dual = functional.group_norm(input, input.shape[1], given.get("weight"), given.get("bias"), given["eps"])
    value = func(forward_ad.unpack_dual(input).primal, *rest, **named)
    return forward_ad.make_dual(value, forward_ad.unpack_dual(dual).tangent)


def _layer_norm(
    func: Callable[..., Tensor],
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
    **named: Any,
) -> Tensor | None:
    x, leading = forward_ad.unpack_dual(input).primal, input.shape[: input.ndim - len(normalized_shape)]
    if torch.is_grad_enabled():
        # torch's own rule holds the statistics constant: gradients of its tangents are wrong, without a word
        # (https://github.com/pytorch/pytorch/issues/196700)
        tangent = _tangent(input) if _constant(weight, bias) else None
        if tangent is None:
            return None
        value = func(x, normalized_shape, weight, bias, eps, *rest, **named)
        x, tangent = x.to(value.dtype), tangent.to(value.dtype)
        flat = x.reshape(*leading, -1)
        mean, inverse = flat.mean(-1), (flat.var(-1, correction=0) + eps).rsqrt()
    else:
        tangent = _own_tangent(input, weight, bias)
        if tangent is None:
            return None
        value, mean, inverse = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
    each, rows = (*leading, 1), (*leading, -1)
    moved = _normalized_tangent(x.reshape(rows), tangent.reshape(rows), mean.reshape(each), inverse.reshape(each))
    moved = moved.reshape(x.shape)
    return forward_ad.make_dual(value, moved if weight is None else moved * weight)


def _softmax(log: bool) -> Callable[..., Any]:
    """Rule of softmax, or of its logarithm."""

    def rule(func: Callable[..., Tensor], input: Tensor, dim: int | None = None, *rest: Any, **named: Any) -> Any:
        tangent = _differentiated(input)
        if tangent is None or dim is None:
            return None
        value = func(forward_ad.unpack_dual(input).primal, dim, *rest, **named)
        shares, tangent = value.exp() if log else value, tangent.to(value.dtype)
        moved = tangent - (shares * tangent).sum(dim, keepdim=True)
        return forward_ad.make_dual(value, moved if log else shares * moved)

    return rule


def _logsumexp(
    func: Callable[..., Tensor], input: Tensor, dim: int | Sequence[int], keepdim: bool = False, **named: Any
) -> Any:
    tangent = _differentiated(input)
    if tangent is None or named:
        return None
    primal = forward_ad.unpack_dual(input).primal
    shares = (primal - func(primal, dim, True)).exp()
    return forward_ad.make_dual(func(primal, dim, keepdim), (shares * tangent).sum(dim, keepdim))


def _attention(
    func: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if all(_differentiated(part) is None for part in (query, key, value)):
        return None
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask
    # what attends to nothing answers zeros
    shares = _softmax(log=False)(torch._safe_softmax, scores, -1)
    shares = torch._safe_softmax(scores, -1) if shares is None else shares
    return functional.dropout(shares, dropout_p).to(value.dtype) @ value


_MULTI_HEAD = types.FunctionType(
    functional.multi_head_attention_forward.__code__,
    vars(functional) | {"has_torch_function": lambda tensors: False},
    argdefs=functional.multi_head_attention_forward.__defaults__,
)
"""Torch's own Python, which asks the rules for its parts, where it would ask them for the whole, again and again."""


def _multi_head(func: Callable[..., Any], query: Tensor, *rest: Any, **named: Any) -> Any:
    if _differentiated(query) is None:
        return None
    with TangentRules():
        return _MULTI_HEAD(query, *rest, **named)


def _differentiated(input: Any) -> Tensor | None:
    """A tangent that is to be differentiated again, where torch's rule of softmax fails: it writes into its parts.

    See https://github.com/pytorch/pytorch/issues/162350.
    """
    return _tangent(input) if torch.is_grad_enabled() else None


def _normalized_tangent(x: Tensor, tangent: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """Tangent of ``(x - mean) / deviation`` over the last axis, with ``inverse`` one over the deviation."""
    normal = (x - mean) * inverse
    along = (normal * tangent).mean(-1, keepdim=True)
    return (tangent - tangent.mean(-1, keepdim=True) - normal * along) * inverse


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys((functional.linear, torch.conv1d, torch.conv2d, torch.conv3d), _affine),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _affine),
    **dict.fromkeys((torch.mul, Tensor.mul, torch.matmul, Tensor.matmul), _product),
    **dict.fromkeys((torch.div, Tensor.div), _quotient),
    **dict.fromkeys((torch.add, Tensor.add), _sum(1)),
    **dict.fromkeys((torch.sub, Tensor.sub), _sum(-1)),
    **dict.fromkeys((Tensor.mul_, Tensor.multiply_, Tensor.__imul__, Tensor.addcmul_, Tensor.addcdiv_), _in_place),
    **dict.fromkeys((Tensor.pow_, Tensor.float_power_, Tensor.__ipow__, Tensor.ldexp_, Tensor.xlogy_), _in_place),
    **dict.fromkeys((Tensor.lerp_, Tensor.atan2_, Tensor.arctan2_, Tensor.hypot_), _in_place),
    **dict.fromkeys((functional.group_norm, torch.group_norm), _group_norm),
    **dict.fromkeys((functional.layer_norm, torch.layer_norm), _layer_norm),
    functional.instance_norm: _instance_norm,
    **dict.fromkeys((functional.softmax, torch.softmax, Tensor.softmax), _softmax(log=False)),
    **dict.fromkeys((functional.log_softmax, torch.log_softmax, Tensor.log_softmax), _softmax(log=True)),
    **dict.fromkeys((torch.logsumexp, Tensor.logsumexp), _logsumexp),
    functional.scaled_dot_product_attention: _attention,
    functional.multi_head_attention_forward: _multi_head,
}
