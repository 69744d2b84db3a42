"""The learners: MAML, Reptile, FineTune."""
