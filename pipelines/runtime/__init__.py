"""What is copied into a bundle: predicts without torch, and imports nothing of ours. A bundle enters, predictions leave."""
