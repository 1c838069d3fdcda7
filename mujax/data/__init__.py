"""Real data from installed packages or the user's own files, and pure ways to draw batches from it.

Everything is in memory as NumPy arrays, split into training and validation once and for all. A batch is
a pure function of a key, so it can be drawn inside `jit` and `vmap` and consumed by `lax.scan`.
"""

from mujax.data._batches import (
    batch_indices as batch_indices,
    image_batches as image_batches,
    text_batches as text_batches,
    text_starts as text_starts,
    text_window as text_window,
    text_windows as text_windows,
)
from mujax.data._files import load as load
from mujax.data._packaged import mnist as mnist, text as text
from mujax.data._splits import (
    MIN_EXAMPLES as MIN_EXAMPLES,
    MIN_TEXT_BYTES as MIN_TEXT_BYTES,
    Data as Data,
    ExampleData as ExampleData,
    Examples as Examples,
    TextData as TextData,
    digest as digest,
)
