"""The layers' products with their weights, and what may differ in one layer of several: source text."""

from __future__ import annotations

IN_FIRST = """\
class Product(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        made = nn.Linear(i, o)
        self.w, self.b = nn.Parameter(made.weight.detach().T.contiguous()), made.bias

    def forward(self, x):
        return {}


def products(i, o):
    return nn.ModuleList(Product(i, o) for _ in range(LAYERS))


"""
#: Definition of ``products(i, o)``, something whose ``[layer](x)`` is a linear layer.
PRODUCTS = {
    "linear": "def products(i, o):\n    return nn.ModuleList(nn.Linear(i, o) for _ in range(LAYERS))\n\n\n",
    "addmm": IN_FIRST.format("torch.addmm(self.b, x.reshape(-1, x.shape[-1]), self.w).view(*x.shape[:-1], -1)"),
    "mm": IN_FIRST.format("(x.reshape(-1, x.shape[-1]).mm(self.w) + self.b).view(*x.shape[:-1], -1)"),
    "matmul": IN_FIRST.format("x @ self.w + self.b"),
    "one tensor": """\
class Products(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        made = [nn.Linear(i, o) for _ in range(LAYERS)]
        self.w, self.b = (nn.Parameter(torch.stack([getattr(m, n) for m in made])) for n in ("weight", "bias"))

    def __getitem__(self, layer):
        return lambda x: F.linear(x, self.w[layer], self.b[layer])


products = Products


""",
}

ROTATED = """\
def rotated(x, pos, theta):
    angle = pos[..., None] / theta ** (torch.arange(0, D, 2) / D)
    angle = angle if pos.dim() == 1 else angle[:, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


"""
#: By name: definitions, lines before the append, lines behind the mask, and the constant ``{}`` in them, of most layers
#: and of the odd one.
DIFFERS = {
    "": ("", "", "", 0, 0),
    "scale": ("", "q = q * {}", "", 0.75, 0.5),
    "theta": (ROTATED, "q, k = rotated(q, pos, {0}), rotated(k, pos, {0})", "", 100.0, 10.0),
    "window": (
        "", "",
        "near = torch.arange(total) > pos[..., None] - {}\nseen = seen & (near if pos.dim() == 1 else near[:, None])",
        9, 3,
    ),
}  # fmt: skip
