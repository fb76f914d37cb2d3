"""The methods that a model can be trained with: `contract` says what a method is, the other modules are methods."""
