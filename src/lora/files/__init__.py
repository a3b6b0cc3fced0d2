"""An adapter on disk: its folder (`adapter`), its settings in PEFT's words, its base's fingerprint, what it holds."""
