"""Training of guards: data, teacher, rendering of typographic images, reasoning SFT and evaluation."""
