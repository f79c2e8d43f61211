"""Encoders of prompts: small networks that make the rows of a prompt of trained inputs.

They are PEFT's (peft/tuners/p_tuning/model.py after Liu et al., GPT Understands, Too, 2021, and
peft/tuners/prefix_tuning/model.py after Li and Liang, Prefix-Tuning, 2021), layer by layer. `name` is that of
`PromptConfig.encoder`.
"""

from torch import Tensor, nn


class MLPEncoder(nn.Sequential):
    """P-tuning's: (P, width) -> (P, width) through two hidden layers with ReLU."""

    name = "mlp"

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__(
            nn.Linear(width, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, width),
        )
        self.hidden_size = hidden_size


class LSTMEncoder(nn.Module):
    """P-tuning's: (P, width) -> (P, width) through a bidirectional LSTM of two layers and an MLP."""

    name = "lstm"

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.lstm = nn.LSTM(width, hidden_size, num_layers=2, bidirectional=True)
        both = 2 * hidden_size
        self.mlp = nn.Sequential(nn.Linear(both, both), nn.ReLU(), nn.Linear(both, width))

    def forward(self, rows: Tensor) -> Tensor:
        return self.mlp(self.lstm(rows)[0])


class PrefixEncoder(nn.Sequential):
    """Prefix tuning's: (P, width) -> (P, columns), the weight of a `Prefix`, through one hidden layer with tanh."""

    name = "mlp"

    def __init__(self, width: int, hidden_size: int, columns: int) -> None:
        super().__init__(nn.Linear(width, hidden_size), nn.Tanh(), nn.Linear(hidden_size, columns))
        self.hidden_size = hidden_size
