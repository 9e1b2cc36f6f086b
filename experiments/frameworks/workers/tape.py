"""Value and gradient by TensorFlow's tape."""

import tensorflow as tf


def differentiated(case, loss):
    z = tf.constant(case.logits)
    with tf.GradientTape() as tape:
        tape.watch(z)
        value = loss(z)
        scalar = tf.reduce_sum(value * case.cotangent) if value.shape.rank else value
    return value.numpy(), tape.gradient(scalar, z).numpy()
