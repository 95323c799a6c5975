"""A model family whose velocities are known in closed form: labels are captions, distillation is a number."""

from types import SimpleNamespace

import torch
from closed_form import Mixture
from torch import nn

from dedistill.data.source import Batch, Slot
from dedistill.flow import keyed
from dedistill.models.conditioning import Conditioning
from dedistill.models.family import Components
from dedistill.models.model import Model

PLANE = Mixture.of([0.4, 0.6], [[-1.0, 0.5], [1.2, -0.3]], [[0.4, 0.7], [0.5, 0.3]], [0, 1])
ONE = Mixture.of([1.0], [[0.8, -0.5]], [[0.4, 0.4]], [0])
LINE = Mixture.of([0.3, 0.5, 0.2], [[-1.5], [0.4], [2.0]], [[0.3], [0.5], [0.2]], [0, 1, 1])
IMAGE = (1, 1, 2)


class ClosedForm:
    """The exact flow of a mixture; its network holds the guidance that was baked in, 1 for an honest model.

    straight: one step is enough, for mixtures of one component (what reflow of the exact pairs would give).
    """

    spec = SimpleNamespace(name="closed_form", prediction="flow")

    def __init__(self, mixture: Mixture, straight: bool = False):
        self.mixture, self.straight = mixture, straight

    def encode_text(self, components, captions, length):
        labels = torch.tensor([[float(c) if c else -1.0] for c in captions])
        return Conditioning.of(torch.zeros(len(captions), 1, 1), torch.ones(len(captions), 1, dtype=torch.bool), pooled=labels)

    def velocity(self, components, denoiser, noisy, sigma, text, guidance=None):
        x, s, out = noisy.flatten(1).double(), sigma.double(), torch.zeros(noisy.flatten(1).shape, dtype=torch.float64)
        fed = torch.as_tensor(1.0 if guidance is None else guidance, dtype=torch.float64).expand(len(x))
        labels = text.vectors["pooled"][:, 0]
        for label, scale in {*zip(labels.tolist(), fed.tolist())}:
            rows = (labels == label) & (fed == scale)
            out[rows] = self._velocity(x[rows], s[rows], int(label), scale * float(denoiser.weight.detach()))
        return out.reshape(noisy.shape)

    def _velocity(self, x, s, label, baked):
        if self.straight:
            column = s[:, None]
            noise = (x - (1 - column) * self.mixture.means) / (column + (1 - column) * self.mixture.stds)
            return noise - self.mixture.transport(noise)
        return self.mixture.velocity(x, s) if label < 0 else self.mixture.guided(x, s, label, baked)

    def decode(self, components, latents):
        return latents

    def shift(self, components, tokens):
        return 1.0

    def tokens(self, components, shape):
        return 1


def closed_form(mixture: Mixture = PLANE, *, baked: float = 1.0, straight: bool = False, chunk: int = 256) -> Model:
    denoiser = nn.Linear(1, 1, bias=False)
    nn.init.constant_(denoiser.weight, baked)
    components = Components(denoiser, SimpleNamespace(unload=lambda: None), IMAGE)
    return Model(ClosedForm(mixture, straight), components, denoiser, text_length=1, chunk=chunk)


class ClosedFormData:
    """Held-out samples of a mixture; the caption is the label."""

    name, image = "closed form", IMAGE

    def __init__(self, mixture: Mixture = PLANE):
        self.mixture = mixture

    def slots(self, seed, step, batch, *, held_out=False):
        return [Slot(f"closed/{position}", (seed, batch, position)) for position in range(batch)]

    def draw(self, slots):
        data, labels = self.mixture.draw(*slots[0].index[:2])
        rows = torch.tensor([slot.index[2] for slot in slots])
        pixels = data[rows].float().reshape(-1, *IMAGE)
        return Batch(pixels, [str(int(k)) for k in labels[rows]])

    def prompts(self, seed, count):
        return [str(int(k)) for k in keyed.generator(seed, "prompts").random(count) < float(self.mixture.weights[-1])]
