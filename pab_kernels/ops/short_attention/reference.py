"""The definition of `short_attention`: that of `attention` without key lengths."""

from ..attention.reference import compute as compute
