r"""The recorder: which operations of a forward pass read which parameters.

What carries curvature is an operation on a parameter, whoever calls it: a module of torch, a module
that somebody has written, a function. The recorder is a torch function mode. It hands the model a
leaf of its own in place of every parameter, follows what is made of these leaves, and sorts what it
sees into

* tensors that no sample has touched: parameters, views and functions of them, buffers, constants;
* *direct calls*, where a rule's operation reads samples and a parameter;
* *shared calls*, where it reads no sample (an embedding of positions), so that its output is the
  same for all samples until it meets them;
* *meetings*, where something that all samples share is broadcast against the samples, or was
  spread over the batch before. Each sample then gets a copy, and the gradient in that copy is the
  sample's: class tokens, position tables, layer scales, relative position biases.

Only the parameter's own path is batched, never what the model computes with. Any other operation on
something that depends on a parameter is noted as the reason why that parameter is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from laplace_debiased.curvature.operations.attention import attend_apart
from laplace_debiased.curvature.operations.call import (
    OperationCall,
    Reading,
    RuleDefaults,
    Use,
    registered_operations,
    samples_first,
)
from laplace_debiased.curvature.operations.views import matrix_place, vector_place
from laplace_debiased.curvature.tape import SharedCall, Tape
from laplace_debiased.curvature.untouched import (
    FLATTENS,
    JOINS,
    LIKE,
    Untouched,
    broadcast_shape,
    is_spread,
    met_copies,
    met_spread,
    note_copies,
    note_flattened,
    of_its_own,
    rows_of,
    stored_view,
    writes,
)
from laplace_debiased.network.function_modes import BlockMode
from laplace_debiased.network.grad_modes import outside_inference_mode
from laplace_debiased.network.inputs import (
    batch_length,
    invoke,
    map_tensors,
    plain_tensors,
    tensors_of,
)
from laplace_debiased.network.interrupts import unbroken
from laplace_debiased.network.modes import evaluation_mode
from laplace_debiased.network.outputs import checked_tensor


class Recorder(BlockMode):
    """Within it, operations on covered parameters are noted on a tape.

    Args:
        tape: where.
        model: the network.
        covered: names of the covered parameters.
        inputs: the network's, m samples.
    """

    def __init__(self, tape: Tape, model: nn.Module, covered: Collection[str], inputs: Any) -> None:
        super().__init__()
        self._rows = rows_of(inputs, tape.length)
        self._tape = tape
        self._rules = registered_operations()
        self._untouched: dict[int, Untouched] = {}
        self._leaves: dict[int, Tensor] = {}
        for buffer in model.buffers():
            self._hold(Untouched(buffer))
        for name, parameter in model.named_parameters():
            leaf = self._leaves[id(parameter)] = parameter.detach()
            value = Untouched(leaf)
            if name in covered:
                self._tape.parameters[name] = leaf.requires_grad_(True)
                itself = frozenset([name])
                value = Untouched(leaf, made_of=itself, names=itself, stored=leaf)
            self._hold(value)

    def _hold(self, value: Untouched) -> None:
        self._untouched[id(value.tensor)] = value

    # -- the mode --------------------------------------------------------------------------

    def run(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Sort a call, note it, and run it."""
        found, is_batched = self._seen(args, kwargs)
        if not found and is_batched:  # nearly all calls
            return self._run_on_samples(func, args, kwargs)
        if found:
            args, kwargs = self._with_leaves(args), self._with_leaves(kwargs)
        name = str(getattr(func, "__name__", func)).strip("_")
        on_parameters = any(value.names for value in found)
        if is_batched and name in LIKE and self._value(args[0]) is not None:
            is_batched = False
        if on_parameters and is_batched:
            return self._meet(func, name, args, kwargs)
        if on_parameters and func in self._rules:
            noted = self._share(func, name, args, kwargs)
            if noted is not NotImplemented:
                return noted
        outputs = func(*args, **kwargs)
        if is_batched:
            if writes(func):  # samples were written to it
                self._untouched.pop(id(args[0]), None)
        else:
            made = args[0] if outputs is None and writes(func) else outputs
            self._hold_outputs(name, made, found)
        return outputs

    def _run_on_samples(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func in JOINS:
            note_copies(self._tape, self._rows, *args, **kwargs)
        outputs = func(*args, **kwargs)
        if func in FLATTENS and args:
            note_flattened(self._tape, self._rows, args[0], outputs)
        return outputs

    def _seen(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[list[Untouched], bool]:
        """Tensors among the arguments that no sample has touched, and whether there are others."""
        found: list[Untouched] = []
        is_batched = False
        stack = [*args, *kwargs.values()] if kwargs else list(args)
        for value in stack:
            if isinstance(value, Tensor):
                leaf = self._leaves.get(id(value), value)
                known = self._untouched.get(id(leaf))
                if known is None:
                    is_batched = True
                else:
                    found.append(known)
            elif isinstance(value, tuple | list):
                stack.extend(value)
            elif isinstance(value, dict):
                stack.extend(value.values())
        return found, is_batched

    def _with_leaves(self, values: Any) -> Any:
        """Arguments with the tape's leaves in place of parameters."""
        return map_tensors(lambda tensor: self._leaves.get(id(tensor), tensor), values)

    def _hold_outputs(self, name: str, outputs: Any, found: list[Untouched]) -> None:
        """Follow what was made of tensors that no sample has touched."""
        calls, made_of, names = _unions(found)
        sources = [value for value in found if value.names]
        through = next((value.through for value in found if value.through), None)
        for output in tensors_of(outputs):
            stored = stored_view(name, sources[0], output) if len(sources) == 1 else None
            spread = is_spread(name, output, found, self._tape.length)
            how = through or (name if sources and stored is None else None)
            value = Untouched(output, stored=stored, spread=spread, through=how)
            if output.requires_grad:
                value = replace(value, calls=calls, made_of=made_of, names=names)
            self._hold(value)

    # -- calls of a rule's operation -----------------------------------------------------------

    def is_covered(self, argument: Any) -> bool:
        """Whether an argument is made of a covered parameter."""
        value = self._value(argument)
        return value is not None and bool(value.names)

    def _value(self, argument: Any) -> Untouched | None:
        """What is known of an argument; of a view that was made apart, through what it views."""
        if not isinstance(argument, Tensor):
            return None
        known = self._untouched.get(id(argument))
        if known is None and argument._base is not None:
            base = self._untouched.get(id(argument._base))
            if base is not None and base.stored is not None:
                return replace(base, tensor=argument, stored=argument)
        return known

    def _reading(self, func: Callable, args: tuple, kwargs: Any) -> Reading | None:
        """The first reading of a call in which an argument in a slot is a parameter."""
        try:
            readings = self._rules[func].readings(*args, **kwargs)
        except TypeError:  # arguments that the rule does not know
            return None
        return next((r for r in readings if any(map(self.is_covered, r.parameters.values()))), None)

    def _uses(self, rule: RuleDefaults, reading: Reading) -> dict[str, Use] | str:
        """The covered parameters of a reading, or why it cannot be covered."""
        if reading.refused is not None:
            return reading.refused
        uses = {}
        for slot, argument in reading.parameters.items():
            value = self._value(argument)
            if value is None or not value.names:
                continue
            if value.stored is None or len(value.names) > 1:
                return f"goes through {value.through or 'other operations'} first"
            (name,) = value.names
            leaf = self._tape.parameters[name]
            matrix = rule.matrix(slot, value.stored.detach(), reading.settings)
            if matrix is None:
                place = vector_place(leaf, value.stored)
            else:
                place = matrix_place(leaf.detach(), value.stored, matrix)
            if place is None or (reading.whole and not place.whole):
                return "is read in parts, or in another order"
            uses[slot] = Use(name, place)
        return uses

    def note(
        self, operation: str, rule: RuleDefaults, reading: Reading, outputs: tuple[Tensor, ...]
    ) -> None:
        """Record a call that read samples, or why it cannot be recorded."""
        uses = self._uses(rule, reading)
        m = self._tape.length
        tensors = (*reading.inputs, *outputs)
        if not isinstance(uses, str) and any(t.ndim == 0 or len(t) % m for t in tensors):
            uses = "the first dimension of what it reads or writes is not the batch"
        if isinstance(uses, str):
            self.refuse(operation, uses, reading.parameters.values())
            if uses == reading.refused:
                values = map(self._value, reading.parameters.values())
                self._tape.depends_on_batch.update(*(v.names for v in values if v is not None))
            return
        if not uses or not all(output.requires_grad for output in outputs):
            return
        is_folded = any(len(tensor) != m for tensor in tensors)
        copies = self._tape.copies
        inputs = tuple(samples_first(t, m, copies) if is_folded else t for t in reading.inputs)
        call = OperationCall(operation, rule, uses, inputs, reading.settings, is_folded)
        self._tape.keep(call, *outputs)

    def refuse(self, operation: str, why: str, arguments: Iterable[Any]) -> None:
        """Note why the parameters that arguments are made of cannot be covered."""
        for argument in arguments:
            value = self._value(argument)
            for name in value.names if value is not None else ():
                self._tape.refused.setdefault(name, f"{operation}: {why}")

    def _share(self, func: Callable, name: str, args: tuple, kwargs: Any) -> Any:
        """Run and record a call that all samples share; NotImplemented if it is another one."""
        reading, rule = self._reading(func, args, kwargs), self._rules[func]
        if reading is None:
            return NotImplemented
        known = [v for tensor in reading.inputs if (v := self._value(tensor)) is not None]
        if len(known) == len(reading.inputs) and all(value.spread for value in known):
            return self._run_noted(func, name, args, kwargs, reading)
        uses = self._uses(rule, reading)
        if isinstance(uses, str):
            return NotImplemented  # followed as any function of the parameter
        outputs = of_its_own(func(*args, **kwargs))
        m = self._tape.length
        shared = tuple(tensor.unsqueeze(0).expand(m, *tensor.shape) for tensor in reading.inputs)
        call = OperationCall(name, rule, uses, shared, reading.settings, folded=True)
        calls, made_of, names = _unions(known)
        calls, names = calls | {len(self._tape.shared)}, names | {u.name for u in uses.values()}
        self._tape.shared.append(SharedCall.of(call, outputs))
        self._hold(Untouched(outputs, calls, made_of, names, through=name))
        return outputs

    def _run_noted(
        self, func: Callable, name: str, args: tuple, kwargs: Any, reading: Reading
    ) -> Any:
        """Run and record a call that reads samples, or what was spread over them."""
        read = {id(tensor) for tensor in reading.inputs}

        def kept(tensor: Tensor) -> Tensor:
            return self._one_each(name, tensor) if id(tensor) in read else tensor

        outputs = of_its_own(func(*map_tensors(kept, args), **map_tensors(kept, kwargs)))
        self.note(name, self._rules[func], reading, (outputs,))
        return outputs

    # -- where parameters meet samples -----------------------------------------------------------

    def _meet(self, func: Callable, name: str, args: tuple, kwargs: Any) -> Any:
        """Run a call that reads samples and something made of parameters."""
        if func is functional.multi_head_attention_forward:
            outputs = attend_apart(self, func, args, kwargs)
            if outputs is not NotImplemented:
                return outputs
        elif func in self._rules:
            args, kwargs, bias = self._without_made_bias(func, args, kwargs)
            reading = self._reading(func, args, kwargs)
            if reading is not None:
                outputs = self._run_noted(func, name, args, kwargs, reading)
                if bias is None:
                    return outputs
                return self._meet(torch.add, "add", (outputs, bias), {})
        copied = partial(self._one_each, name, shape_of=broadcast_shape(name, args, kwargs))
        return func(*map_tensors(copied, args), **map_tensors(copied, kwargs))

    def _without_made_bias(
        self, func: Callable, args: tuple, kwargs: Any
    ) -> tuple[tuple, Any, Tensor | None]:
        """A linear map's arguments, and apart a bias that is more than a part of a parameter."""
        if func is not functional.linear:
            return args, kwargs, None
        bound = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
        value = self._value(bound.get("bias"))
        if value is None or not value.names or (value.stored is not None and len(value.names) == 1):
            return args, kwargs, None
        return (bound["input"], bound["weight"]), {}, bound["bias"]

    def _one_each(
        self,
        name: str,
        tensor: Tensor,
        shape_of: Callable[[Tensor], torch.Size] | None = None,
    ) -> Tensor:
        """An argument with a copy for every sample, if it is made of parameters and can be.

        Args:
            name: the operation, for the reason if it cannot.
            tensor: the argument.
            shape_of: shape that the operation broadcasts an argument to; None if it does not.
        """
        value = self._untouched.get(id(tensor))
        if value is None or not value.names:
            return tensor
        copies = None
        if shape_of is not None:
            copies = met_copies(self._tape, value, shape_of(tensor))
        elif value.spread:
            copies = met_spread(self._tape, value)
        if copies is None:
            why = "has no rule" if shape_of is None else "does not have the batch in front"
            self.refuse(name, why, [tensor])
            return tensor
        return copies


def _unions(
    found: Sequence[Untouched],
) -> tuple[frozenset[int], frozenset[str], frozenset[str]]:
    """Calls and parameters that any of some tensors is made of or depends on."""
    return (
        frozenset().union(*(value.calls for value in found)),
        frozenset().union(*(value.made_of for value in found)),
        frozenset().union(*(value.names for value in found)),
    )


@unbroken
def _recording(
    tape: Tape, model: nn.Module, covered: frozenset[str], inputs: Any
) -> Iterator[None]:
    with Recorder(tape, model, covered, inputs):
        yield


def record(
    model: nn.Module, covered: Collection[str], inputs: Any, general: Collection[str] = ()
) -> Tape:
    """Run the model on a batch in evaluation mode, and record what it does with parameters.

    Args:
        model: the network; left untouched.
        covered: names of its covered parameters; without any there is no graph.
        inputs: one batch of model inputs, m samples.
        general: those whose operations are known to have no rule: nothing of them is recorded.

    Raises:
        TypeError: if the model does not return a tensor.
    """
    tape = Tape(batch_length(inputs) if covered else 0)
    with (
        outside_inference_mode(),
        torch.set_grad_enabled(bool(covered)),
        evaluation_mode(model),
    ):
        inputs = plain_tensors(inputs)
        with _recording(tape, model, frozenset(covered), inputs) if covered else nullcontext():
            tape.outputs = checked_tensor(invoke(model, inputs))
    tape.close(general)
    return tape
