"""Where each parameter and buffer lies on disk, asked of transformers' own conversion mapping.

Nothing here knows a family: names are renamed as `from_pretrained` renames them, the places of
experts within stored tensors are traced once for each distinct form (`expert_trace`), and what else
transformers converts (dense weights that are joined, split or permuted) is converted whole by its
own operations. The same places serve reading, checking and writing.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megablocks_utils.checkpoint.conversion import Conversion, ModelShapes, revert, saved_transforms
from megablocks_utils.checkpoint.expert_trace import (
    ExpertPart,
    Span,
    assemble,
    trace_parts,
)
from megablocks_utils.checkpoint.stored_names import (
    NameMapping,
    StoredShapes,
    StoredTensors,
    last_number,
)
from megablocks_utils.errors import CheckpointError
from megablocks_utils.moe.expert_spec import find_expert_parameters

__all__ = ["ModelLayout"]


class ModelLayout:
    """Say where the parameters and persistent buffers of a model lie in a checkpoint.

    Names and shapes are those of the model as it is now; wrapping it later changes nothing here.

    Args:
        model: whose tensors they are; may be on meta.
        stored: the checkpoint's tensors.

    Attributes:
        shapes: of every parameter and persistent buffer, by name.
        buffers: names of the persistent buffers.
        tied: parameters that are the same tensor as another one, by whose name they go.
        missing: names of which nothing is stored.
        unused: stored tensors that no parameter or buffer takes, with what they are renamed to;
            also what is stored of one that is stored already, under another name.
    """

    def __init__(self, model: PreTrainedModel, stored: StoredTensors):
        state = model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = frozenset(state.keys() - parameters.keys())
        self.tied = {c: s for c, s in model.all_tied_weights_keys.items() if c in state}
        self._experts = find_expert_parameters(model).keys()
        self._model = ModelShapes(self.shapes, model.config)
        self._stored = stored
        mapping = NameMapping(model, state)
        targets = mapping.targets(stored.keys())
        self._transforms = [t for t in mapping.transforms if t.was_used()]
        self._plain: dict[str, str] = {}
        self.unused: dict[str, str] = {}
        groups: dict[str, dict[str, str]] = {}
        for key, (name, pattern) in targets.items():
            if name in state and pattern is not None:
                groups.setdefault(name, {})[key] = pattern
            elif name in state and name not in self._plain:
                self._plain[name] = key
            else:
                self.unused[key] = name
        self._conversions: dict[str, Conversion] = {}
        for name, patterns in groups.items():
            if name in self._plain:  # stored twice, in two forms
                self.unused |= dict.fromkeys(patterns, name)
                continue
            sources = tuple(patterns.items())
            conversion = Conversion(mapping.converter(sources[0][1]), name, sources)
            self._conversions |= dict.fromkeys(conversion.names, conversion)
        self.missing = tuple(name for name in state if not self.sources(name))
        # Where a form has been traced before, only the keys differ from layer to layer.
        self._held: dict[str, Tensor] = {}
        self._traces: dict[object, dict[int, list[ExpertPart]]] = {}

    @classmethod
    def of_saved(cls, model: PreTrainedModel) -> "ModelLayout":
        """Return the layout in which transformers would save a model that it has not loaded."""
        state = {
            name: torch.empty(tensor.shape, device="meta")
            for name, tensor in model.state_dict().items()
            if name not in model.all_tied_weights_keys
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        saved = revert(state, shapes, model.config, saved_transforms(model))
        return cls(model, StoredShapes({key: tuple(tensor.shape) for key, tensor in saved.items()}))

    def sources(self, name: str) -> tuple[str, ...]:
        """Return the stored tensors that a parameter or persistent buffer is made of."""
        conversion = self._conversions.get(name)
        if conversion is not None:
            return tuple(key for key, _ in conversion.sources)
        for alias in self._same_tensor(name):
            if alias in self._plain:
                return (self._plain[alias],)
        return ()

    def names(self, key: str) -> tuple[str, ...]:
        """Return the parameters and buffers that take something of a stored tensor."""
        return self._names_by_key.get(key, ())

    def is_plain(self, name: str) -> bool:
        """Return whether one stored tensor is the parameter, element for element."""
        return name not in self._conversions

    def is_expert(self, name: str) -> bool:
        """Return whether a parameter is an expert weight or bias."""
        return name in self._experts

    def expert_parts(self, name: str, experts: range) -> Iterator[ExpertPart]:
        """Yield what is stored of some experts of an expert weight, expert by expert.

        Raises:
            CheckpointError: what is stored is not all of the weight, or is no rows and columns.
        """
        if self.is_plain(name):
            (key,) = self.sources(name)
            rows, columns = (Span(range(n), range(n)) for n in (*self.shapes[name][1:], 1)[:2])
            for expert in experts:
                yield ExpertPart(key, expert, expert, rows, columns, is_turned=False)
            return
        keys = self.sources(name)
        for expert in experts:
            for part in self._trace(name)[expert]:
                yield replace(part, key=keys[int(part.key)])

    def count_stored_experts(self, name: str) -> int:
        """Return how many experts are stored of an expert weight."""
        if self.is_plain(name):
            shapes = [self._stored.shape(key) for key in self.sources(name)]
            return max((shape[0] for shape in shapes), default=0)
        patterns = [pattern for _, pattern in self._conversions[name].sources]
        return max(patterns.count(pattern) for pattern in patterns)

    def convert(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """Return a parameter that transformers converts, whole.

        Args:
            name: of a parameter that is not plain.
            read: returns a stored tensor.
        """
        tensors = {key: read(key) for key in self.sources(name)}
        return self._conversions[name].run(tensors, self._model)[name]

    def check(self, name: str) -> None:
        """Check that a parameter which transformers converts can be made of what is stored.

        Raises:
            CheckpointError: it cannot.
        """
        if self.is_expert(name):
            self._trace(name)
            return
        shapes = self.stored_shapes(name)
        stand_ins = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        with _as_checkpoint_error(name):
            made = self.convert(name, stand_ins.__getitem__)
        if tuple(made.shape) != self.shapes[name]:
            raise CheckpointError(
                f"{name} would be {tuple(made.shape)} instead of {self.shapes[name]}"
            )

    def stored_shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of what is stored of a parameter or buffer."""
        return {key: self._stored.shape(key) for key in self.sources(name)}

    def tied_pairs(self) -> Iterator[tuple[str, str]]:
        """Yield the stored tensors of each tied parameter that is stored twice: copy, source."""
        for copy, source in self.tied.items():
            if copy in self._plain and source in self._plain:
                yield self._plain[copy], self._plain[source]

    def hub_tensors(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield what is written for a parameter or buffer: each stored name with its tensor.

        Experts are put where they were found; of other weights that transformers converts, the
        last of a group yields all that becomes of the group, whose tensors are held until then.

        Args:
            name: in memory.
            tensor: whole.
        """
        if self.is_plain(name):
            if name not in self.tied:
                yield from ((key, tensor) for key in self.sources(name) or (name,))
        elif self.is_expert(name):
            for key, parts in self._parts_by_key(name).items():
                yield key, assemble(parts, tensor, self._stored.shape(key))
        else:
            names = self._conversions[name].names
            self._held[name] = tensor
            if name == self._last_of_group(name):
                group = {other: self._held.pop(other) for other in names}
                made = revert(group, self.shapes, self._model.config, self._transforms)
                yield from sorted(made.items())

    def hub_shapes(self, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes of what `hub_tensors` yields, in its order."""
        if self.is_plain(name):
            if name not in self.tied:
                yield from ((key, self.shapes[name]) for key in self.sources(name) or (name,))
        elif self.is_expert(name):
            keys, held = (
                self.sources(name),
                {int(p.key) for p in chain(*self._trace(name).values())},
            )
            yield from ((key, self._stored.shape(key)) for n, key in enumerate(keys) if n in held)
        elif name == self._conversions[name].names[-1]:
            yield from sorted(self.stored_shapes(name).items())

    def _last_of_group(self, name: str) -> str:
        """Return which of the parameters that are converted together comes last in the model."""
        names = self._conversions[name].names
        return [other for other in self.shapes if other in names][-1]

    def _same_tensor(self, name: str) -> Iterator[str]:
        """Yield the names of a parameter, its own first."""
        yield name
        source = self.tied.get(name, name)
        yield from (other for other in (source, *self.tied) if self.tied.get(other) == source)
        yield source

    @cached_property
    def _names_by_key(self) -> dict[str, tuple[str, ...]]:
        names: dict[str, tuple[str, ...]] = {}
        for name in self.shapes:
            for key in self.sources(name):
                names[key] = (*names.get(key, ()), name)
        return names

    def _parts_by_key(self, name: str) -> dict[str, list[ExpertPart]]:
        parts: dict[str, list[ExpertPart]] = {key: [] for key in self.sources(name)}
        for part in self.expert_parts(name, range(self.shapes[name][0])):
            parts[part.key].append(part)
        return {key: found for key, found in parts.items() if found}

    def _trace(self, name: str) -> dict[int, list[ExpertPart]]:
        """Return the parts of an expert weight by expert; their keys are numbers of its sources."""
        conversion = self._conversions[name]
        stored = self.stored_shapes(name)
        number = conversion.names.index(name)
        patterns = tuple(pattern for _, pattern in conversion.sources)
        numbers = tuple(last_number(key) for key in stored)
        form = (id(conversion.converter), number, patterns, numbers, tuple(stored.values()))
        if (form, self.shapes[name]) not in self._traces:
            keys = {key: str(number) for number, key in enumerate(stored)}
            by_expert: dict[int, list[ExpertPart]] = {}
            with _as_checkpoint_error(name):
                conversion.check_numbers()
                parts = self._trace_now(name, conversion, stored)
            for part in parts:
                by_expert.setdefault(part.expert, []).append(replace(part, key=keys[part.key]))
            self._traces[form, self.shapes[name]] = by_expert
        return self._traces[form, self.shapes[name]]

    def _trace_now(
        self, name: str, conversion: Conversion, stored: Mapping[str, tuple[int, ...]]
    ) -> list[ExpertPart]:
        def convert(stand_ins: Mapping[str, Tensor]) -> Tensor:
            # An operation that compares the shapes of memory and disk shall find what it will find.
            is_alike = self.shapes[name] in stored.values()
            form = tuple(next(iter(stand_ins.values())).shape) if is_alike else ()
            model = ModelShapes(dict.fromkeys(self.shapes, form), self._model.config)
            return conversion.run(stand_ins, model)[name]

        return trace_parts(convert, stored, self.shapes[name])


@contextmanager
def _as_checkpoint_error(name: str) -> Iterator[None]:
    """Turn what transformers' operations raise for tensors that do not fit into a sentence."""
    try:
        yield
    except (CheckpointError, RuntimeError, ValueError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{name} cannot be made of what is stored: {reason}") from error
