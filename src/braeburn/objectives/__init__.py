"""What is minimised: cross-entropy and distillation, over a vocabulary split over devices."""
