"""The numbers of one step of AdamW, for whatever computes it."""

from dataclasses import dataclass

__all__ = ["AdamWStep"]


@dataclass(frozen=True)
class AdamWStep:
    """What a step of AdamW does, beside the tensors.

    Attributes:
        lr: learning rate.
        betas: of the moments' running means.
        eps: added to the root of the second moment.
        weight_decay: decoupled; a share of the weight for each unit of learning rate.
        step: number of this step, from 1 on.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int

    @property
    def kept_weight(self) -> float:
        """What weight decay leaves of a weight."""
        return 1 - self.lr * self.weight_decay

    @property
    def step_size(self) -> float:
        """The learning rate, over the first moment's bias correction."""
        return self.lr / (1 - self.betas[0] ** self.step)

    @property
    def scale_correction(self) -> float:
        """The root of the second moment's bias correction."""
        return (1 - self.betas[1] ** self.step) ** 0.5

    def numbers(self) -> tuple[float, ...]:
        """Return what the kernel takes as one tuple; the last: 1 - beta1, beta2, 1 - beta2."""
        beta1, beta2 = self.betas
        scales = (self.kept_weight, self.step_size, self.scale_correction, self.eps)
        return (*scales, 1 - beta1, beta2, 1 - beta2)
