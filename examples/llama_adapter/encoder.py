"""A small encoder of pictures that has never seen a label, made in half a minute on a CPU.

    python examples/llama_adapter/encoder.py                    # of scikit-learn's 1,797 handwritten digits
    python examples/llama_adapter/encoder.py --pictures FOLDER  # or of a folder with one of pictures for each class

Two views of a picture, turned, moved and with noise, should have near features, and those of other pictures far ones
(SimCLR, Chen et al., 2020). It is written to `out/llama_adapter/encoder.safetensors` and stays frozen from then on.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional

OUT = Path("out/llama_adapter")
WIDTH, GRID, SCALES = 128, 16, 5  # of a feature; places of the 4 x 4 grid; the whole picture and its quarters
SIZE = 32  # of pictures from a folder; the digits have 8
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Pictures(NamedTuple):
    """pixels (count, channels, size, size) in [0, 1], in an order drawn once; labels (count,); the name of each label;
    how many come first for training. The rest is held out: neither the encoder nor the adapter sees it."""

    pixels: Tensor
    labels: Tensor
    names: list[str]
    trained: int


def read_pictures(folder: str | None) -> Pictures:
    """The digits that scikit-learn ships, or a folder with one folder of pictures for each class."""
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels, labels, names = torch.tensor(digits.images)[:, None].float() / 16, torch.tensor(digits.target), DIGITS
    else:
        import numpy as np
        from PIL import Image

        files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        names = sorted({path.parent.name for path in files})
        images = [np.array(Image.open(path).convert("RGB").resize((SIZE, SIZE))) for path in files]
        pixels = torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float() / 255
        labels = torch.tensor([names.index(path.parent.name) for path in files])
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return Pictures(pixels[order], labels[order], names, int(0.8 * len(order)))


class PictureEncoder(nn.Module):
    """Convolutions to a 4 x 4 grid of features, of mean 0 and variance 1 over the pictures that it was made of."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        half = WIDTH // 2
        layers = [self._layer(channels, half, 1)]
        while size > 8:
            layers, size = [*layers, self._layer(half, half, 2)], size // 2
        layers += [self._layer(half, half, 1), self._layer(half, WIDTH, 2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)]
        self.layers = nn.Sequential(*layers)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("deviation", torch.ones(WIDTH))

    @staticmethod
    def _layer(inner: int, outer: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inner, outer, 3, padding=1, stride=stride, bias=False), nn.BatchNorm2d(outer), nn.ReLU()
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, channels, size, size) to (batch, 16, 128): a token for each place."""
        grid = self.layers(pixels).flatten(2).transpose(1, 2)
        return (grid - self.mean) / self.deviation


def scales(tokens: Tensor) -> Tensor:
    """(batch, 16, 128) to (batch, 5, 128): the mean over the whole picture and over each of its quarters."""
    grid = tokens.transpose(1, 2).unflatten(2, (4, 4))
    return torch.cat([functional.avg_pool2d(grid, side).flatten(2) for side in (4, 2)], 2).transpose(1, 2)


def view(pixels: Tensor) -> Tensor:
    """The same pictures as somebody else would have taken them."""
    count, colour = len(pixels), pixels.shape[1] == 3
    angle, zoom, shift = (torch.rand(count, n) - 0.5 for n in (1, 1, 2))
    angle, zoom, shift = angle * 0.5, 1 + zoom * 0.5, shift * 0.5
    rows = [
        [zoom * angle.cos(), -zoom * angle.sin(), shift[:, :1]],
        [zoom * angle.sin(), zoom * angle.cos(), shift[:, 1:]],
    ]
    place = torch.stack([torch.cat(row, 1) for row in rows], 1)
    if colour:
        place[:, :, 0] *= torch.randint(0, 2, (count, 1)) * 2 - 1  # mirrored
    padding = "reflection" if colour else "zeros"
    grid = functional.affine_grid(place, list(pixels.shape), align_corners=False)
    seen = functional.grid_sample(pixels, grid, padding_mode=padding, align_corners=False)
    if colour:
        light = 1 + (torch.rand(count, 3, 1, 1) - 0.5) * 0.6
        seen = seen * light + (torch.rand(count, 3, 1, 1) - 0.5) * 0.4
    return seen + torch.randn_like(seen) * 0.1


def make_encoder(pictures: Pictures, passes: int = 40, batch: int = 256, rate: float = 3e-3) -> PictureEncoder:
    """Train an encoder on the pictures that are not held out, without their labels."""
    torch.manual_seed(0)
    pixels = pictures.pixels[: pictures.trained]
    encoder = PictureEncoder(pixels.shape[1], pixels.shape[2])
    head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 64))
    trained = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=1e-2)
    batch = min(batch, len(pixels))
    steps = passes * max(1, len(pixels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    other = torch.arange(2 * batch).roll(batch)  # where the other view of each is
    for _ in range(steps):
        chosen = pixels[torch.randperm(len(pixels))[:batch]]
        near = functional.normalize(head(encoder(torch.cat([view(chosen), view(chosen)])).mean(1)), dim=1)
        alike = (near @ near.T / 0.2).fill_diagonal_(float("-inf"))
        functional.cross_entropy(alike, other).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    encoder.eval().requires_grad_(False)
    features = encode(encoder, pixels)
    encoder.mean.copy_(features.mean((0, 1)))
    encoder.deviation.copy_(features.std((0, 1)))
    return encoder


@torch.no_grad()
def encode(encoder: PictureEncoder, pixels: Tensor) -> Tensor:
    """(count, 16, 128) features of pictures, as many as there are."""
    return torch.cat([encoder(part) for part in pixels.split(256)])


def load_encoder(pictures: Pictures, file: Path = OUT / "encoder.safetensors") -> PictureEncoder:
    """The encoder of a file, frozen."""
    encoder = PictureEncoder(pictures.pixels.shape[1], pictures.pixels.shape[2])
    load_model(encoder, file)
    return encoder.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", help="a folder with a folder of pictures for each class")
    parser.add_argument("--out", default=str(OUT), help="where encoder.safetensors goes")
    parser.add_argument("--passes", type=int, default=40, help="over the pictures")
    options = parser.parse_args()
    pictures = read_pictures(options.pictures)
    encoder = make_encoder(pictures, options.passes)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    save_model(encoder, str(Path(options.out) / "encoder.safetensors"))
    print(f"{options.out}/encoder.safetensors: made of {pictures.trained} pictures, {GRID} x {WIDTH} features of each")


if __name__ == "__main__":
    main()
