"""Small networks, each with one way of moving channels about. ``ZOO`` names them all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from models.networks.attention import HeadsAttention
from models.networks.resnet import PadShortcut

ZOO: dict[str, type[nn.Module]] = {}
SHAPES: dict[str, tuple[int, ...]] = {}  # inputs other than [1, 3, 8, 8]
IMAGE = (1, 3, 8, 8)


def entry(cls):
    ZOO[cls.__name__] = cls
    return cls


def conv(c_in, c_out, k=3, **more):
    return nn.Sequential(nn.Conv2d(c_in, c_out, k, padding=k // 2, **more), nn.BatchNorm2d(c_out), nn.SiLU())


class Net(nn.Module):
    """A stem of 16 channels, ``body``, the mean over space and a linear head on ``width`` channels."""

    width = 16
    stem_width = 16

    def __init__(self):
        super().__init__()
        self.stem = conv(3, self.stem_width)
        self.build()
        self.head = nn.Linear(self.width, 5)

    def build(self):
        pass

    def body(self, x):
        return x

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def net(build, body, width=16, stem_width=16):
    """Make a class of a builder of layers and a body; both get the network first."""
    return type("Made", (Net,), {"build": build, "body": body, "width": width, "stem_width": stem_width})


def named(name, build=lambda s: None, body=lambda s, x: x, width=16, stem_width=16):
    ZOO[name] = net(build, body, width, stem_width)


def layers(**made):
    """Return a builder; the values make the layers."""

    def build(self):
        for name, make in made.items():
            setattr(self, name, make())

    return build


def two(c=16, **more):
    return layers(a=lambda: conv(16, c, **more), b=lambda: conv(c, 16))


# ---- what nets are made of
named("residual", two(8), lambda s, x: x + s.b(s.a(x)))
named(
    "concat", layers(a=lambda: conv(16, 8), b=lambda: conv(16, 4), c=lambda: conv(12, 16)), lambda s, x: s.c(torch.cat((s.a(x), s.b(x)), 1))
)
named("concat_and_add", two(8), lambda s, x: torch.cat((x, s.b(s.a(x)) + x), 1), width=32)
named("branches", layers(a=lambda: conv(16, 16), b=lambda: nn.Sequential(conv(16, 8), conv(8, 16))), lambda s, x: s.a(x) + s.b(x))
named("shared", layers(a=lambda: conv(16, 16), b=lambda: conv(16, 16)), lambda s, x: s.b(s.a(s.a(x))))
named("depthwise", layers(a=lambda: conv(16, 16, groups=16), b=lambda: conv(16, 16, 1)), lambda s, x: s.b(s.a(x)))
named("depthwise_wider", layers(a=lambda: conv(16, 32, groups=16), b=lambda: conv(32, 16, 1)), lambda s, x: s.b(s.a(x)))
named("many_groups", layers(a=lambda: conv(16, 24, groups=8), b=lambda: conv(24, 16, 1)), lambda s, x: s.b(s.a(x)))
named(
    "many_groups_gated",
    layers(a=lambda: conv(16, 32, groups=8), g=lambda: nn.Conv2d(32, 32, 1), b=lambda: conv(32, 16, 1)),
    lambda s, x: (lambda y: s.b(s.g(y.mean((2, 3), keepdim=True)).sigmoid() * y))(s.a(x)),
)
named("two_groups", layers(a=lambda: conv(16, 24, groups=2), b=lambda: conv(24, 16, 1)), lambda s, x: s.b(s.a(x)))
named("transposed", layers(a=lambda: nn.ConvTranspose2d(16, 12, 2, 2), b=lambda: conv(12, 16)), lambda s, x: s.b(s.a(x).relu()))
named(
    "transposed_two", layers(a=lambda: nn.ConvTranspose2d(16, 12, 2, 2, groups=2), b=lambda: conv(12, 16)), lambda s, x: s.b(s.a(x).relu())
)
named(
    "transposed_many", layers(a=lambda: nn.ConvTranspose2d(16, 32, 2, 2, groups=8), b=lambda: conv(32, 16)), lambda s, x: s.b(s.a(x).relu())
)
named(
    "squeeze_excite",
    layers(d=lambda: nn.Conv2d(16, 4, 1), u=lambda: nn.Conv2d(4, 16, 1), b=lambda: conv(16, 16)),
    lambda s, x: s.b(x * s.u(s.d(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()),
)
named(
    "spatial_attention",
    layers(a=lambda: nn.Conv2d(2, 1, 3, padding=1), b=lambda: two_convs(8)),
    lambda s, x: s.b(x) * s.a(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)).sigmoid(),
)
named("interpolate", two(), lambda s, x: x + F.interpolate(s.b(F.avg_pool2d(s.a(x), 2)), scale_factor=2, mode="bilinear"))
named("reflected", two(), lambda s, x: s.b(F.pad(s.a(x), (1, 1, 1, 1), mode="reflect")))


def two_convs(c):
    return nn.Sequential(conv(16, c), conv(c, 16))


class PreActivation(nn.Module):
    def __init__(self, c_in, growth):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat((x, self.conv(F.relu(self.norm(x), inplace=True))), 1)


named(
    "dense_block", layers(a=lambda: nn.Sequential(*(PreActivation(16 + 4 * i, 4) for i in range(3)))), lambda s, x: s.a(x).relu(), width=28
)


# ---- option A
named(
    "pad_fixed",
    layers(a=lambda: conv(8, 16, stride=2), b=lambda: conv(16, 16)),
    lambda s, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + s.b(s.a(x)),
    stem_width=8,
)
named(
    "pad_shortcut",
    layers(a=lambda: conv(8, 16, stride=2), b=lambda: conv(16, 16), short=lambda: PadShortcut(8, 16, 2), c=lambda: conv(16, 16)),
    lambda s, x: s.c(s.short(x) + s.b(s.a(x))),
    stem_width=8,
)
named(  # the zero channel is not zero any more where the gather reads it
    "pad_gather_dirty",
    lambda s: (layers(a=lambda: conv(8, 9), b=lambda: conv(8, 16))(s), s.register_buffer("index", torch.tensor([8, 3, 2, 1, 0, 5, 6, 7]))),
    lambda s, x: s.b((F.pad(x, (0, 0, 0, 0, 0, 1)) + s.a(x))[:, s.index]),
    stem_width=8,
)


# ---- parts
def shuffle(x, groups):
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def shuffle_fixed(x, groups, each):
    b, _, h, w = x.shape
    return x.view(b, groups, each, h, w).transpose(1, 2).reshape(b, groups * each, h, w)


def halves(x):
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:]


def quarter(x):
    c = x.shape[1]
    return x.split([c // 4, c - c // 4], 1)


def written(s, x, out):
    out[:, :8] = s.a(x)
    return out


named("shuffle", two(), lambda s, x: s.b(shuffle(s.a(x), 4)))
named(
    "shuffle_module", layers(a=lambda: conv(16, 16), m=lambda: nn.ChannelShuffle(2), b=lambda: conv(16, 16)), lambda s, x: s.b(s.m(s.a(x)))
)
named("shuffle_grouped", layers(a=lambda: conv(16, 16, groups=2), b=lambda: conv(16, 16, groups=2)), lambda s, x: s.b(shuffle(s.a(x), 2)))
named("shuffle_by_size", two(), lambda s, x: s.b(shuffle(s.a(x), s.a(x).shape[1] // 4)))
named("shuffle_fixed", two(), lambda s, x: s.b(shuffle_fixed(s.a(x), 4, 4)))
named("glu", layers(a=lambda: conv(16, 32), c=lambda: conv(16, 16)), lambda s, x: s.c(F.glu(s.a(x), 1)))
named(
    "chunk_gate",
    layers(a=lambda: conv(16, 32), c=lambda: conv(16, 16)),
    lambda s, x: s.c((lambda u, v: u * v.sigmoid())(*s.a(x).chunk(2, 1))),
)
named("flip", two(), lambda s, x: s.b(s.a(x).flip(1)))
named("flip_and_add", two(), lambda s, x: x + s.b(s.a(x)).flip(1))
named("roll_one", two(), lambda s, x: s.b(s.a(x).roll(1, 1)))
named("roll_back", two(), lambda s, x: s.b(s.a(x).roll(-2, 1)))
named("roll_half", two(), lambda s, x: s.b(s.a(x).roll(s.a(x).shape[1] // 2, 1)))
named("roll_all", two(), lambda s, x: s.b(s.a(x).roll(1)))
named("strided", layers(a=lambda: conv(8, 16), b=lambda: conv(8, 16)), lambda s, x: s.a(x[:, ::2]) + s.b(x[:, 1::2]))
named("halves", layers(a=lambda: conv(8, 16), b=lambda: conv(8, 16)), lambda s, x: (lambda u, v: s.a(u) + s.b(v))(*halves(x)))
named("quarters", layers(a=lambda: conv(4, 16), b=lambda: conv(12, 16)), lambda s, x: (lambda u, v: s.a(u) + s.b(v))(*quarter(x)))
named("first_four", layers(a=lambda: conv(4, 16), b=lambda: conv(12, 16)), lambda s, x: s.a(x[:, :4]) + s.b(x[:, 4:]))
named("last_four", layers(a=lambda: conv(4, 16), b=lambda: conv(12, 16)), lambda s, x: s.a(x[:, -4:]) + s.b(x[:, :-4]))
named("one_channel", layers(a=lambda: conv(1, 16), b=lambda: conv(16, 16)), lambda s, x: s.a(x[:, 3].unsqueeze(1)) + s.b(x))
named(
    "split_fixed", layers(a=lambda: conv(5, 16), b=lambda: conv(11, 16)), lambda s, x: (lambda u, v: s.a(u) + s.b(v))(*x.split([5, 11], 1))
)
named("unbind", layers(b=lambda: conv(16, 16)), lambda s, x: s.b(torch.stack(x.unbind(1)[::-1], 1)))
named("stack", layers(a=lambda: conv(16, 16), b=lambda: conv(16, 16)), lambda s, x: torch.stack((s.a(x), s.b(x)), 2).amax(2))
named("lined_up", layers(a=lambda: conv(16, 16), b=lambda: conv(16, 16)), lambda s, x: torch.cat((s.a(x), s.b(x)), 3))
named("pixel_shuffle", layers(a=lambda: conv(16, 16), b=lambda: conv(4, 16)), lambda s, x: s.b(F.pixel_shuffle(s.a(x), 2)))
named("pixel_unshuffle", layers(a=lambda: conv(16, 4), b=lambda: conv(16, 16)), lambda s, x: s.b(F.pixel_unshuffle(s.a(x), 2)))
named("repeat", layers(a=lambda: conv(16, 8), b=lambda: conv(16, 16)), lambda s, x: s.b(s.a(x).repeat(1, 2, 1, 1)))
named("repeat_interleave", layers(a=lambda: conv(16, 8), b=lambda: conv(16, 16)), lambda s, x: s.b(s.a(x).repeat_interleave(2, 1)))
named("expand", layers(a=lambda: conv(16, 1), b=lambda: conv(8, 16)), lambda s, x: s.b(s.a(x).expand(-1, 8, -1, -1)))
named("expand_same", two(), lambda s, x: s.b(s.a(x).mean((2, 3), keepdim=True).expand(-1, 16, 8, 8)))
named(
    "index_buffer",
    lambda s: (two()(s), s.register_buffer("index", torch.tensor([3, 1, 0, 2, *range(15, 3, -1)]))),
    lambda s, x: s.b(s.a(x)[:, s.index]),
)
named(
    "index_select",
    lambda s: (two()(s), s.register_buffer("index", torch.arange(15, -1, -1))),
    lambda s, x: s.b(s.a(x).index_select(1, s.index)),
)
named("index_list", two(), lambda s, x: s.b(s.a(x)[:, [3, 1, 0, 2, *range(15, 3, -1)]]))
named("mask_list", layers(a=lambda: conv(16, 16), b=lambda: conv(8, 16)), lambda s, x: s.b(s.a(x)[:, torch.arange(16) % 2 == 0]))


# ---- parameters, norms
named("prelu", layers(a=lambda: nn.Sequential(nn.Conv2d(16, 16, 3), nn.PReLU()), b=lambda: conv(16, 16)), lambda s, x: s.b(s.a(x)))
named("prelu_each", layers(a=lambda: nn.Sequential(nn.Conv2d(16, 16, 3), nn.PReLU(16)), b=lambda: conv(16, 16)), lambda s, x: s.b(s.a(x)))


def normed(make):
    return layers(a=lambda: nn.Conv2d(16, 16, 3, padding=1), n=make, b=lambda: conv(16, 16))


def a_norm_b(s, x):
    return s.b(s.n(s.a(x)).relu())


named("group_norm", normed(lambda: nn.GroupNorm(4, 16)), a_norm_b)
named("group_norm_one", normed(lambda: nn.GroupNorm(1, 16)), a_norm_b)
named("group_norm_bare", normed(lambda: nn.GroupNorm(4, 16, affine=False)), a_norm_b)
named("instance_norm", normed(lambda: nn.InstanceNorm2d(16)), a_norm_b)
named("instance_norm_affine", normed(lambda: nn.InstanceNorm2d(16, affine=True, track_running_stats=True)), a_norm_b)
named("batch_norm_bare", normed(lambda: nn.BatchNorm2d(16, affine=False)), a_norm_b)
named("batch_norm_untracked", normed(lambda: nn.BatchNorm2d(16, track_running_stats=False)), a_norm_b)
named("local_response_norm", normed(lambda: nn.LocalResponseNorm(3)), a_norm_b)
named("layer_scale", lambda s: (two()(s), setattr(s, "scale", nn.Parameter(torch.rand(16, 1, 1)))), lambda s, x: x + s.scale * s.b(s.a(x)))
named(
    "softplus_scale",
    lambda s: (two()(s), setattr(s, "scale", nn.Parameter(torch.rand(16, 1, 1)))),
    lambda s, x: s.b(F.softplus(s.scale) * s.a(x)),
)
named(
    "bare_weight",
    lambda s: (two()(s), setattr(s, "w", nn.Parameter(torch.randn(16, 16, 3, 3)))),
    lambda s, x: s.b(F.conv2d(s.a(x), s.w, padding=1)),
)
named(
    "matmul_parameter",
    lambda s: (two()(s), setattr(s, "w", nn.Parameter(torch.randn(16, 16)))),
    lambda s, x: s.b((s.a(x).permute(0, 2, 3, 1) @ s.w).permute(0, 3, 1, 2)),
)
named(
    "matmul_before",
    lambda s: (two()(s), setattr(s, "w", nn.Parameter(torch.randn(16, 16)))),
    lambda s, x: s.b((s.w @ s.a(x).flatten(2)).view(x.shape)),
)
named(
    "matmul_to_one",
    lambda s: (layers(a=lambda: conv(16, 12), b=lambda: conv(1, 16))(s), setattr(s, "w", nn.Parameter(torch.randn(12, 1)))),
    lambda s, x: s.b((s.a(x).permute(0, 2, 3, 1) @ s.w).permute(0, 3, 1, 2)),
)
named(
    "linear_to_one",
    layers(a=lambda: conv(16, 12), l=lambda: nn.Linear(12, 1), b=lambda: conv(1, 16)),
    lambda s, x: s.b(s.l(s.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
)
named(
    "einsum",
    lambda s: (two()(s), setattr(s, "w", nn.Parameter(torch.randn(16, 16)))),
    lambda s, x: s.b(torch.einsum("bchw,oc->bohw", s.a(x), s.w)),
)
named("weight_norm", layers(a=lambda: parametrizations.weight_norm(nn.Conv2d(16, 16, 3)), b=lambda: two_convs(8)), lambda s, x: s.b(s.a(x)))
named(
    "standardised_weight",
    layers(a=lambda: nn.Conv2d(16, 16, 3, padding=1), b=lambda: two_convs(8)),
    lambda s, x: s.b(F.conv2d(x, s.a.weight - s.a.weight.mean((1, 2, 3), keepdim=True), s.a.bias)),
)
named(
    "blur",
    lambda s: (two()(s), s.register_buffer("k", torch.rand(16, 1, 3, 3))),
    lambda s, x: s.b(F.conv2d(s.a(x), s.k, groups=s.k.shape[0])),
)


named(
    "spectral_norm",
    layers(a=lambda: parametrizations.spectral_norm(nn.Conv2d(16, 16, 3)), b=lambda: two_convs(8)),
    lambda s, x: s.b(s.a(x)),
)


# ---- what attends to channels, and other ways in which they meet
def gated_by_neighbours(s, x):
    """Efficient channel attention: a 1-D convolution along the channels."""
    y = s.a(x)
    return s.b(y * s.g(y.mean((2, 3)).unsqueeze(1)).sigmoid().transpose(1, 2).unsqueeze(3))


def gated_by_statistics(s, x):
    """CBAM's second half: mean and maximum over the channels at each position."""
    y = s.a(x)
    return s.b(y * s.g(torch.cat((y.mean(1, True), y.amax(1, True)), 1)).sigmoid())


def response_norm(s, x):
    """ConvNeXt V2's global response norm: each channel's norm over space by the mean of all."""
    y = s.a(x)
    norm = y.norm(p=2, dim=(2, 3), keepdim=True)
    return s.b(y + s.scale * (y * (norm / (norm.mean(1, True) + 1e-6))))


def recurrent(s, x):
    y = s.a(x)
    return s.b(s.r(y.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(y.shape))


GATED = layers(a=lambda: conv(16, 16), g=lambda: nn.Conv1d(1, 1, 3, padding=1, bias=False), b=lambda: two_convs(8))
named("efficient_attention", GATED, gated_by_neighbours)
GATED = layers(a=lambda: conv(16, 16), g=lambda: nn.Conv2d(2, 1, 3, padding=1, bias=False), b=lambda: two_convs(8))
named("channel_statistics", GATED, gated_by_statistics)
SCALED = layers(a=lambda: conv(16, 16), b=lambda: two_convs(8), scale=lambda: nn.Parameter(torch.rand(1, 16, 1, 1)))
named("global_response_norm", SCALED, response_norm)
named("lstm", layers(a=lambda: conv(16, 16), r=lambda: nn.LSTM(16, 16, batch_first=True), b=lambda: two_convs(8)), recurrent)
WIDE = layers(a=lambda: conv(16, 16), w=lambda: conv(144, 16, 1), b=lambda: two_convs(8))
named("unfold", WIDE, lambda s, x: s.b(s.w(F.unfold(s.a(x), 3, padding=1).unflatten(2, x.shape[2:]))))
named("maxout", layers(a=lambda: conv(16, 32), b=lambda: two_convs(8)), lambda s, x: s.b(s.a(x).unflatten(1, (-1, 2)).amax(2)))
MET = layers(a=lambda: conv(16, 16), m=lambda: nn.Bilinear(16, 16, 16), b=lambda: two_convs(8))
named("bilinear", MET, lambda s, x: s.b(s.m(*[s.a(x).movedim(1, -1).contiguous()] * 2).movedim(-1, 1)))


# ---- in place
named("in_place", two(), lambda s, x: s.b(s.a(x).mul_(2).relu_()).add_(x))
named("add_in_place", two(), lambda s, x: s.b(s.a(x)).__iadd__(x))
named("written_slice", layers(a=lambda: conv(16, 8)), lambda s, x: written(s, x, x.clone()))
named("written_zeros", layers(a=lambda: conv(16, 8)), lambda s, x: written(s, x, torch.zeros(x.shape)))
named("written_like", layers(a=lambda: conv(16, 8)), lambda s, x: written(s, x, torch.zeros_like(x)))
named("out_argument", two(), lambda s, x: s.b(torch.add(s.a(x), x, out=torch.empty(x.shape))))
named("masked_fill", two(), lambda s, x: s.b(s.a(x).masked_fill_(x > 0.5, 0.1)))
named("log_sigmoid", two(), lambda s, x: s.b(F.logsigmoid(s.a(x))))


# ---- what couples channels, and what nobody knows
named("softmax", layers(a=lambda: conv(16, 16), b=lambda: two_convs(8)), lambda s, x: s.b(s.a(x).softmax(1)))
named("sum", layers(a=lambda: conv(16, 16), b=lambda: conv(1, 16)), lambda s, x: s.b(s.a(x).sum(1, keepdim=True)))
named("mean_last", two(), lambda s, x: s.b(s.a(x) * s.a(x).permute(0, 2, 3, 1).mean((2, 3)).mean()))
named("max_pool_channels", layers(a=lambda: conv(16, 16), b=lambda: conv(8, 16)), lambda s, x: s.b(F.max_pool3d(s.a(x), (2, 1, 1))))
named("cumsum", layers(a=lambda: conv(16, 16), b=lambda: two_convs(8)), lambda s, x: s.b(s.a(x).cumsum(1)))
named("sort", layers(a=lambda: conv(16, 16), b=lambda: two_convs(8)), lambda s, x: s.b(s.a(x).sort(1)[0]))
named("fourier", layers(a=lambda: conv(16, 16), b=lambda: two_convs(8)), lambda s, x: s.b(torch.fft.fft(s.a(x), dim=1).real))
named("branch", two(), lambda s, x: s.b(s.a(x)) if x.mean() > 0 else s.a(x))
named("branch_on_width", two(), lambda s, x: s.b(s.a(x)) * (2 if s.a[0].out_channels > 15 else 1))
named("leak", two(), lambda s, x: s.b(x) * (1 + abs(s.a(x).flatten().tolist()[0])))
named("leak_numpy", two(), lambda s, x: s.b(x) * (1 + float(abs(s.a(x).numpy()).max() if not s.training else 1)))
named("leak_data", two(), lambda s, x: s.b(x) * (1 + s.a(x).data.mean((2, 3)).amax(1)).view(-1, 1, 1, 1))
named("equal", two(), lambda s, x: s.b(s.a(x)) if torch.equal(s.a(x), x) else s.b(x))
named(
    "restrided", layers(a=lambda: conv(16, 8), b=lambda: conv(8, 16)), lambda s, x: s.b(s.a(x).as_strided_((1, 8, 8, 8), (512, 1, 64, 8)))
)
named("constant_added", two(), lambda s, x: s.b(s.a(x) + torch.arange(16.0).view(1, 16, 1, 1)))
named(
    "coordinates",
    layers(a=lambda: conv(16, 8), b=lambda: conv(10, 16)),
    lambda s, x: s.b(torch.cat((s.a(x), torch.ones(len(x), 2, 8, 8)), 1)),
)
named("unused", layers(a=lambda: conv(16, 16), b=lambda: conv(16, 16)), lambda s, x: (s.a(x), s.b(x))[1])
named("outer", two(), lambda s, x: s.b(s.a(x)) * (x.mean((2, 3)).unsqueeze(2) * x.mean((2, 3)).unsqueeze(1)).mean())


@entry
class TwoOutputs(Net):
    def build(self):
        self.a = conv(16, 16)

    def forward(self, x):
        x = self.stem(x)
        y = self.a(x)
        return {"logits": self.head(y.mean((2, 3))), "others": (self.head(x.mean((2, 3))), [y.sum((1, 2, 3))])}


@entry
class FeaturesOut(Net):
    """The maps themselves are an output."""

    def build(self):
        self.a = conv(16, 16)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.a(x).mean((2, 3))), x


@entry
class Flattened(nn.Module):
    """Space is left when the maps are flattened."""

    def __init__(self):
        super().__init__()
        self.a, self.l, self.n, self.head = conv(3, 8, stride=2), nn.Linear(8 * 16, 12), nn.BatchNorm1d(12), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.n(self.l(self.a(x).flatten(1))).relu())


@entry
class Tied(nn.Module):
    """One parameter in two modules."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 16), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)
        self.b.weight = self.a.weight

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))


@entry
class TiedTransposed(nn.Module):
    """An autoencoder's weight, once as it is and once transposed."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.head = conv(3, 16), nn.Linear(16, 12), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        return self.head(F.linear(self.a(x).relu(), self.a.weight.t()))


@entry
class TiedDepthwise(nn.Module):
    """One depthwise weight in two modules."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = conv(3, 16), nn.Linear(16, 5)
        self.a, self.b = (nn.Conv2d(16, 16, 3, groups=16, padding=1, bias=False) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(self.stem(x)).relu()).relu().mean((2, 3)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.dw, self.norm = nn.Conv2d(c, c, 3, padding=1, groups=c), nn.LayerNorm(c)
        self.up, self.down, self.gamma = nn.Linear(c, 2 * c), nn.Linear(2 * c, c), nn.Parameter(torch.rand(c))

    def forward(self, x):
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


named("convnext", layers(a=lambda: ConvNeXtBlock(16)), lambda s, x: s.a(x))


@entry
class Tokens(nn.Module):
    """Patches, a class token, a position embedding, attention, an MLP."""

    def __init__(self):
        super().__init__()
        self.patch, self.cls, self.pos = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.n1, self.n2, self.attention = nn.LayerNorm(16), nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp, self.head = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), 1) + self.pos
        y = self.n1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(self.n2(x)))[:, 0])


@entry
class PlainTokens(nn.Module):
    """A class token and a position embedding without norms: nothing couples the channels."""

    def __init__(self):
        super().__init__()
        self.patch, self.cls, self.pos = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 2, 16)), nn.Parameter(torch.randn(1, 6, 16))
        self.mlp, self.head = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), 1) + self.pos
        return self.head((x + self.mlp(x))[:, 0])


@entry
class HandAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.out, self.head = conv(3, 16), nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 5)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-2, -1)) * 0.3).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(b, n, c))
        return self.head((x + self.mlp(x)).mean(1))


class Heads(nn.Module):
    """Attention whose numbers of heads and channels are attributes; subclasses take the products."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 4, 8, 32
        self.qkv, self.proj = nn.Linear(16, 96), nn.Linear(32, 16)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.meet(q, k, v).transpose(1, 2).reshape(b, n, self.attn_dim))


class FusedHeads(Heads):
    def meet(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class BiasedHeads(Heads):
    """Positions have a bias in each head, from a table, as in Swin; queries and keys are normed within their head."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Parameter(torch.randn(7, 4)), nn.LayerNorm(8)
        self.register_buffer("index", torch.arange(16).view(4, 4) % 7)

    def meet(self, q, k, v):
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        return ((self.norm(q) @ self.norm(k).transpose(-2, -1)) * 0.3 + bias).softmax(-1) @ v


class TalkingHeads(Heads):
    """The heads are mixed by linear layers before and after the softmax, as in CaiT."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def meet(self, q, k, v):
        scores = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(2)
        return self.after(scores).permute(0, 3, 1, 2) @ v


class CrossCovarianceHeads(Heads):
    """Channels attend to channels within a head, as in XCiT."""

    def meet(self, q, k, v):
        return ((k.transpose(-2, -1) @ q).softmax(-1) @ v.transpose(-2, -1)).transpose(-2, -1)


class SeparateHeads(Heads):
    """Queries, keys and values have layers of their own, and einsum takes the products."""

    def __init__(self):
        super().__init__()
        self.qkv, self.q, self.k, self.v = None, nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(16, 32)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.num_heads, -1)) for layer in (self.q, self.k, self.v))
        scores = torch.einsum("bihc,bjhc->bhij", q, k).softmax(-1)
        return self.proj(torch.einsum("bhij,bjhc->bihc", scores, v).flatten(2))


class TorchHeads(nn.Module):
    """torch's own, of which whole heads can go."""

    def __init__(self):
        super().__init__()
        self.attention = HeadsAttention(16, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def attending(kind):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.n, self.a, self.head = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), kind(), nn.Linear(16, 5)

        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            return self.head((x + self.a(self.n(x))).mean(1))

    return Attending


for kind in (FusedHeads, BiasedHeads, TalkingHeads, CrossCovarianceHeads, SeparateHeads, TorchHeads):
    ZOO[kind.__name__] = attending(kind)


@entry
class Mixer(nn.Module):
    """Linear layers over positions and over channels by turns."""

    def __init__(self):
        super().__init__()
        self.patch, self.tokens = nn.Conv2d(3, 16, 2, 2), nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16))
        self.mlp, self.head = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.mlp(x)).mean(1))


@entry
class OneDimension(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Conv1d(3, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2)), nn.Conv1d(16, 12, 3)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool1d(self.b(self.a(x)).sigmoid(), 1).flatten(1))


@entry
class ThreeDimensions(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Sequential(nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2)), nn.Conv3d(16, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool3d(self.b(self.a(x)).sigmoid(), 1).flatten(1))


SHAPES |= {"OneDimension": (1, 3, 16), "ThreeDimensions": (1, 3, 4, 4, 4)}


# ---- what the tests of channels and of surgery share
def randomised(model, seed=0):
    """Give every parameter and statistic a value that hides nothing: no zero, no one, no symmetry."""
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)]
    for norm in norms:
        for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.5, 0.5), ("running_mean", -0.3, 0.3), ("running_var", 0.5, 1.5)):
            if isinstance(tensor := getattr(norm, name, None), torch.Tensor):
                tensor.data.uniform_(low, high, generator=generator)
    return model


def make(name, seed=0):
    torch.manual_seed(seed)
    return randomised(ZOO[name](), seed)


def example(name, batch=1, seed=1):
    return torch.randn(batch, *SHAPES.get(name, IMAGE)[1:], generator=torch.Generator().manual_seed(seed))


def random_keep(graph, rate, generator):
    """Remove a share of every group that can be cut, at random; at least one unit goes and one stays."""
    keep = {}
    for group in graph.prunable:
        free = [unit for unit in range(group.size) if unit not in group.fixed]
        count = min(max(round(rate * group.size), 1), len(free), group.size - 1)
        gone = {free[i] for i in torch.randperm(len(free), generator=generator)[:count].tolist()}
        keep[group.name] = [unit for unit in range(group.size) if unit not in gone]
    return keep


class Residual(nn.Module):
    """A stem, a residual branch with norms, a layer behind the sum, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.a_norm = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.b_norm = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem_norm(self.stem(x)).relu()
        x = (x + self.b_norm(self.b(self.a_norm(self.a(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))
