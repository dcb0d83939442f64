"""A DLRM on click logs, trained with TorchRec and CAFE tables."""
