"""Real data from installed packages or from files, split and drawn in batches."""

from mujax.data._data import (
    MIN_EXAMPLES as MIN_EXAMPLES,
    MIN_TEXT_BYTES as MIN_TEXT_BYTES,
    Data as Data,
    ExampleData as ExampleData,
    Examples as Examples,
    TextData as TextData,
    batch_indices as batch_indices,
    digest as digest,
    image_batches as image_batches,
    load as load,
    mnist as mnist,
    text as text,
    text_batches as text_batches,
    text_starts as text_starts,
    text_window as text_window,
    text_windows as text_windows,
)
