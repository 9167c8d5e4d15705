"""Sequence mixers under one protocol (`minrnn.mixers.base.Mixer`)."""
