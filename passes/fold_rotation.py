"""Let the weights of linear layers rotate values and rotate attention's output back.

    rotate_values(views(linear(h, W, b)))      =>    views(linear(h, W', b'))
    linear(views(rotate_values(out, back)), W) =>    linear(views(out), W')

W' are copies, rotated once per weight, and inputs of the graph (``xquant_fx/cache/folded_weights.py``); the program's
own stay as they are. Which layers, the records say (``match_folding.py``).
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from xquant_fx.cache.folded_weights import Fold, folded_weight
from xquant_fx.passes.context import Context
from xquant_fx.passes.graph import add_input
from xquant_fx.passes.records import Linear


def fold_rotation(gm: GraphModule, context: Context) -> int:
    """Fold what the records say; returns how many rotations are gone."""
    count, folding = 0, _Folding(gm, context)
    for site in context.detection.sites:
        if site.folding is None or site.form is None or site.value_write is None:
            continue
        dim = context.detection.specs[site.buffers[1]].shape[3]
        pairs = ((site.folding.value, site.value_write.node, True), (site.folding.output, site.form.output, False))
        for linear, place, rows in pairs:
            rotation = context.rotations.get(place)  # several attentions may read what one append stores
            if linear is not None and rotation is not None:
                del context.rotations[place]
                folding.fold(linear, rotation, Fold(rows, dim))
                count += 1
    return count


class _Folding:
    """Rotated weights that the graph takes so far, each once."""

    def __init__(self, gm: GraphModule, context: Context) -> None:
        self.graph, self.context = gm.graph, context
        self.known: dict[tuple[Node, Fold], Node] = {}

    def fold(self, linear: Linear, rotation: Node, fold: Fold) -> None:
        """Take ``rotation`` out and let ``linear`` have rotated weights."""
        taken = rotation.args[0]
        assert isinstance(taken, Node)
        rotation.replace_all_uses_with(taken)
        self.graph.erase_node(rotation)
        linear.node.replace_input_with(linear.weight, self._rotated(linear.weight, fold))
        if linear.bias is not None:
            linear.node.replace_input_with(linear.bias, self._rotated(linear.bias, fold))

    def _rotated(self, weight: Node, fold: Fold) -> Node:
        if (weight, fold) not in self.known:
            index, state = self.context.index_of(weight), self.context.state
            last = self.graph.find_nodes(op="placeholder")[-1]
            example = folded_weight(self.context.inputs[index], fold)  # type: ignore[arg-type]
            node = add_input(self.graph, last, f"xquant_folded{len(state.folded)}", example)
            state.folded.append((index, fold))
            state.folded_examples.append(example)
            self.known[weight, fold] = node
        return self.known[weight, fold]
