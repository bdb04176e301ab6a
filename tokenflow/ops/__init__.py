"""Operations on tensors and processes; needs torch only."""
