"""From a checkpoint's headers to streamed parameters; no weight byte is read here."""
