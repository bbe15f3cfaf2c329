"""What is learned: encoders, MAE, losses, schedules and the thin LightningModules around them."""
