"""Checks of files before a library reads them: an engines folder may be from a stranger.

A hash finds damage, not malice, and libraries follow what a file says. So each kind of file is held
against what an export writes: ONNX graphs (`graph_content`, read by `protobuf`), tokenizers
(`tokenizer_content`), `arrays`, and the manifest itself (`consistency`).
"""
