package protocol

import "slices"

// RecordCodes are the reasons that the server's log may give for a record, merge's and source's: the catalogue is closed, the
// database takes no other.
func RecordCodes() []Code { return slices.Clone(recordCodes) }

var recordCodes = []Code{
	CodeStale, CodeRowDeleted, CodeRowExists, CodeUnknownTable, CodeUnknownColumn, CodeInvalidValue, CodeMissingKey, CodeKeyChange,
	CodeNotSubscribed, CodeOperation, CodeDuplicate, CodeRowTooBig, CodeInvalidRecord,
	CodeConstraint, CodeTrigger, CodeSource, CodeValue, CodePermission, CodeDependency, CodeTransaction,
	CodeYields, CodeFunctionRefused, CodeFunctionFailed,
	CodeSchema, CodeEpoch,
}
